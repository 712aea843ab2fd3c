import errno
import os
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as some

from adabatch import record

def history(epochs=3):
    return [{
        name: float(k + e)
        for k, name in enumerate((*record.COUNTS, *record.MEASURES, *record.CLOCKS))} for e in range(epochs)]

def save(path, **changes):
    record.save(
        path,
        **dict(
            history=history(), config={"processes": 1, "micro_batch": None}, environment={"device": "none"},
            status="complete") | changes)

def test_round_trip(tmp_path):
    path = tmp_path / "a" / "b.npz"
    save(path)
    r = record.load(path)
    assert (
        r.epochs == 3 and r.status == "complete" and r.config["processes"] == 1 and r.environment == {"device": "none"})
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

@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b""])
def test_a_torn_file_is_refused_by_name(tmp_path, harm):
    path = tmp_path / "run.npz"
    save(path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match="run.npz is damaged or not a record .*delete it"): record.load(path)

def test_no_altered_byte_is_read_as_another_number(tmp_path):
    path = tmp_path / "run.npz"
    save(path)
    whole, before, refused = path.read_bytes(), record.load(path), 0
    for i in range(0, len(whole), 11):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        try: assert record.differences(record.load(path), before) == []  # a date in the zip's directory, say
        except ValueError as error: refused += "run.npz is damaged or not a record" in str(error)
    assert refused > 100

def test_other_npz_files_are_no_records(tmp_path):
    np.savez(tmp_path / "other.npz", test_error=np.zeros(3))
    with pytest.raises(ValueError, match="damaged or not a record"): record.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="absent.npz is not there"):
        record.load(tmp_path / "absent.npz")

def test_a_full_disk_leaves_the_record_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    save(path)
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="run.npz could not be written .No space left on device"):
        save(path, status="diverged")
    assert record.load(path).status == "complete" and len(list(tmp_path.iterdir())) == 1

def test_as_configured_and_summary(tmp_path):
    rows = [
        row | dict(batch_size=128, processes=3, micro_batch=43, samples=1000, train_seconds=2.0, test_seconds=0.5)
        for row in history()]
    for config, expected in (
        (dict(processes=3, micro_batch=None), True),
        (dict(processes=3, micro_batch=64), True),
        (dict(processes=1, micro_batch=None), False),
        (dict(processes=3, micro_batch=7), False),
    ):
        save(tmp_path / "run.npz", history=rows, config=config)
        assert record.load(tmp_path / "run.npz").as_configured is expected
    assert "500 training samples/s, 8 s on none" in record.load(tmp_path / "run.npz").summary()

def test_figures_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    save(tmp_path / "run.npz")
    for name in ("matplotlib", "matplotlib.pyplot"): monkeypatch.setitem(sys.modules, name, None)
    r = record.load(tmp_path / "run.npz")
    for draw in (lambda: record.plot_run({"a": r}), lambda: record.plot_phases(r)):
        with pytest.raises(ImportError, match=r"pip install adabatch\[report\]"): draw()

@pytest.mark.parametrize("changes", [
    dict(lr=np.zeros(2)), dict(lr=np.zeros((3, 1))), dict(lr=np.zeros(3, np.float32)), dict(updates=np.zeros(3)),
    dict(status="done"), dict(config="[]"), dict(config="{"), dict(environment="3"),
    dict(lr=np.array(["a", "b", "c"]))])
def test_a_record_whose_values_are_of_another_kind_is_refused(tmp_path, changes):
    path = tmp_path / "run.npz"
    save(path)
    with np.load(path) as f: values = {n: f[n] for n in f.files}
    np.savez(path, **values | changes)
    with pytest.raises(ValueError, match="run.npz is damaged or not a record"): record.load(path)
