import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as some

from adabatch import record

NAMES = *record.COUNTS, *record.MEASURES, *record.CLOCKS

def history(): return [{name: float(k + epoch) for k, name in enumerate(NAMES)} for epoch in range(3)]

def save(path, **changes):
    usual = dict(history=history(), config={"processes": 1, "micro_batch": None}, environment={"device": "none"})
    record.save(path, **usual | dict(status="complete") | changes)

def test_round_trip(tmp_path):
    path = tmp_path / "a" / "b.npz"
    save(path)
    r = record.load(path)
    assert (r.epochs, r.status, r.config["processes"], r.environment) == (3, "complete", 1, {"device": "none"})
    assert r.batch_size.dtype == np.int64 and r.test_error.tolist() == [row["test_error"] for row in history()]
    assert [p.name for p in path.parent.iterdir()] == ["b.npz"]
    with pytest.raises(AttributeError, match="no 'accuracy'"): getattr(r, "accuracy")  # noqa: B009

def test_any_record_is_read_as_it_was_saved(tmp_path):
    kinds = {name: some.integers(-(2**63), 2**63 - 1) for name in record.COUNTS}
    kinds |= {name: some.floats() for name in (*record.MEASURES, *record.CLOCKS)}
    text = some.text(some.characters(exclude_categories=["Cs"]))
    values = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | text
    settings = some.dictionaries(text, values, max_size=5)
    @hypothesis.given(some.lists(some.fixed_dictionaries(kinds), min_size=1, max_size=4), settings, settings)
    @hypothesis.settings(deadline=None, max_examples=50, derandomize=True)
    def check(history, config, environment):
        save(tmp_path / "any.npz", history=history, config=config, environment=environment)
        r = record.load(tmp_path / "any.npz")
        assert (r.config, r.environment, r.epochs) == (config, environment, len(history))
        for name, array in r.arrays.items():
            assert array.tobytes() == np.array([row[name] for row in history], array.dtype).tobytes()
    check()

def test_differences_leave_clocks_out_and_see_every_bit(tmp_path):
    rows = history()
    rows[1]["train_seconds"] += 1
    rows[2]["test_loss"] = np.nextafter(rows[2]["test_loss"], 100)
    save(tmp_path / "a.npz")
    save(tmp_path / "b.npz", history=rows)
    assert record.differences(record.load(tmp_path / "a.npz"), record.load(tmp_path / "b.npz")) == ["test_loss"]

def test_other_npz_files_are_no_records(tmp_path):
    np.savez(tmp_path / "other.npz", test_error=np.zeros(3))
    with pytest.raises(ValueError, match="damaged or not a record"): record.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="absent.npz is not there"): record.load(tmp_path / "absent.npz")

def test_as_configured_and_summary(tmp_path):
    made = dict(batch_size=128, processes=3, micro_batch=43, samples=1000, train_seconds=2.0, test_seconds=0.5)
    for processes, micro_batch, expected in ((3, None, True), (3, 64, True), (1, None, False), (3, 7, False)):
        config = dict(processes=processes, micro_batch=micro_batch)
        save(tmp_path / "run.npz", history=[row | made for row in history()], config=config)
        found = record.load(tmp_path / "run.npz")
        assert found.as_configured is expected and "500 training samples/s, 8 s on none" in found.summary()

def test_figures_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    save(tmp_path / "run.npz")
    for name in ("matplotlib", "matplotlib.pyplot"): monkeypatch.setitem(sys.modules, name, None)
    r = record.load(tmp_path / "run.npz")
    for draw in (lambda: record.plot_run({"a": r}), lambda: record.plot_phases(r)):
        with pytest.raises(ImportError, match=r"pip install adabatch\[report\]"): draw()

def test_a_record_whose_values_are_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    save(path)
    with np.load(path) as f: values = {n: f[n] for n in f.files}
    wrong = [dict(lr=a) for a in (np.zeros(2), np.zeros((3, 1)), np.zeros(3, np.float32), np.array(["a"] * 3))]
    wrong += [dict(updates=np.zeros(3)), dict(status="done")]
    wrong += [dict(config="[]"), dict(config="{"), dict(environment="3")]
    for changes in wrong:
        np.savez(path, **values | changes)
        with pytest.raises(ValueError, match="run.npz is damaged or not a record"): record.load(path)
