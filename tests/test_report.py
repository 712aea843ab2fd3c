import json, re
from pathlib import Path

import pytest
from test_analysis import make

from adabatch import record, report, sweep
from adabatch.analysis import Comparison, collect, comparisons, examined
from adabatch.experiment import CONTROLS, select
from adabatch.train import existing

C = Comparison("digits", "alexnet")

def test_tables_show_what_is_missing_and_where_a_number_is_from(tmp_path):
    for seed, error in enumerate((4.0, 6.0)): make(tmp_path, seed=seed, error=error)
    evidence = collect(tmp_path)
    table = report.arms_table(evidence, [("digits", "alexnet", arm) for arm in ("fixed-16", "fixed-256")], "../")
    assert "| 5.00 ± 1.41 (n=2) |" in table and "[1](../digits/alexnet/fixed-16-seed1.npz)" in table
    assert "fixed-256" not in table

def test_hours_come_from_records_of_the_same_network_or_are_unknown(tmp_path):
    make(tmp_path, row=dict(samples=100, train_seconds=8.0, test_seconds=2.0))  # a tenth of a second a sample
    table = report.not_run(collect(tmp_path), "digits", 1)
    lines = {line.split(" | ")[1]: line for line in table.splitlines()[2:]}
    command = "python -m adabatch.sweep --grid digits --dataset digits --model alexnet --seeds 1"
    assert f"| 3 | `{command}` |" in lines["alexnet"]
    assert f"| {3 * 10 * 1437 / 36_000:.1f} (none, from records of digits) |" in lines["alexnet"]
    assert "| 4 |" in lines["vgg19bn"] and "unknown" in lines["vgg19bn"]

def test_the_first_table_has_a_row_for_each_comparison(tmp_path):
    for seed in range(2):
        make(tmp_path, seed, error=5.0 + seed)
        make(tmp_path, seed, error=15.0 + 1.1 * seed, schedule="adabatch", row=dict(updates=4))
    evidence = collect(tmp_path)
    row = report.comparisons_table(evidence, comparisons(evidence)).splitlines()[-1]
    assert "| 6.00 ± 0.71 | 16.05 ± 0.78 | +10.05 (paired +9.73 to +10.37) | 2 pairs | 32 → 8 |" in row
    assert report.comparisons_table(collect(tmp_path / "none"), []) == "No runs yet."

def test_controls_have_a_row_where_they_were_run(tmp_path):
    make(tmp_path, error=20.0, schedule="adabatch", dataset="cifar10")
    make(tmp_path, error=26.0, dataset="cifar10", batch_size=640, lr=0.025)
    table = report.controls_table(collect(tmp_path))
    assert "| constant batch | fixed-640-lr0.025 | 32 | 26.50 | +6.00 | 1 pair |" in table
    assert not any(name in table for name in CONTROLS if name != "constant batch")

def test_a_sentence_that_no_longer_fits_is_left_out(tmp_path):
    for seed in range(4):
        make(tmp_path, seed, 20 + seed / 10, dataset="cifar10")
        make(tmp_path, seed, 20.2 + seed / 9, dataset="cifar10", schedule="adabatch")
    for error, schedule in ((20.0, "fixed"), (20.4, "adabatch")):
        make(tmp_path, error=error, dataset="cifar100", schedule=schedule)
    (found,) = report.findings(collect(tmp_path), tmp_path)
    assert found.fits and "20.9 % against 20.5 % for the small batch, but 1 pair do" in found.text
    for seed in range(4):
        make(tmp_path, seed, 60 + seed / 10, dataset="cifar100")
        make(tmp_path, seed, 60.2 + seed / 9, dataset="cifar100", schedule="adabatch")
    (found,) = report.findings(collect(tmp_path), tmp_path)
    assert found.fits and "CIFAR-10 and of CIFAR-100" in found.text and found.text.count("4 pairs") == 2
    make(tmp_path, 3, 23.0, dataset="cifar10", schedule="adabatch")
    (found,) = report.findings(collect(tmp_path), tmp_path)
    assert not found.fits and report.answers(collect(tmp_path), tmp_path).startswith("Nothing was run yet")

def test_every_sentence_fits_the_committed_records():
    found = report.findings(collect("outputs"))
    assert found and [finding.text for finding in found if not finding.fits] == []

def test_readme_and_report_say_what_the_committed_records_say():
    evidence = collect("outputs")
    begin, end = report.MARKERS
    stored = Path("README.md").read_text().split(begin)[1].split(end)[0].strip()
    assert stored == report.results(evidence), "type `make report`"
    shown = [o["data"].get("text/markdown") for cell in json.loads(Path("outputs/report.ipynb").read_text())["cells"]
             for o in cell.get("outputs", ()) if "data" in o]
    for text in (report.answers(evidence, details=True), report.controls_table(evidence)):
        assert text in ["".join(markdown or "") for markdown in shown], "type `make report`"

def test_the_committed_records_are_those_of_the_grids_and_none_is_made_again():
    assert [path for path, *_, objection in examined("outputs") if objection] == []
    runs = [run for grid in ("cpu", "paper", "digits") for run in select(grid, 3, device="cpu")]
    assert sum(existing(run) is not None for run in runs) > 50  # it raises if a setting differs

def test_a_large_batch_with_a_scaled_rate_is_found_whatever_else_its_name_says(tmp_path):
    for settings in (dict(schedule="adabatch"), {}, dict(batch_size=4096), dict(batch_size=4096, warmup_epochs=5)):
        make(tmp_path, dataset="cifar10", compile=True, made=dict(compile=True), **settings)
    table = report.large_batch_table(collect(tmp_path))
    assert re.findall(r"fixed-4096[^ ]*", table) == ["fixed-4096-compile", "fixed-4096-warmup5-compile"]

def test_runs_that_share_no_seed_and_a_comparison_of_triggers_half_made_end_no_report(tmp_path):
    fifth = dict(dataset="cifar10", epochs=20, every=4)
    for seed in range(2): make(tmp_path, seed, schedule="adabatch", **fifth)
    for settings in (fifth, dict(dataset="cifar10")): make(tmp_path, 7, batch_size=640, lr=0.025, **settings)
    make(tmp_path, dataset="cifar10", schedule="adabatch")
    for model in ("alexnet", "resnet20", "vgg19bn"):
        for schedule in ("adabatch", "fixed"): make(tmp_path, model=model, schedule=schedule)
    (tmp_path / "growth-alexnet.json").write_text(json.dumps({"fixed-16-seed0": {}}))
    report.findings(collect(tmp_path), tmp_path)

def diverge(path):
    r = record.load(path)
    rows = [{name: values[0] for name, values in r.arrays.items()}]
    record.save(path, rows, r.config, r.environment, "diverged")

def test_runs_that_diverged_end_no_report(tmp_path):
    for seed in range(4):
        for schedule in ("adabatch", "fixed"):
            path = make(tmp_path, seed, dataset="cifar10", epochs=20, every=4, schedule=schedule)
    diverge(path)
    diverge(make(tmp_path, dataset="cifar10", epochs=20, every=4, batch_size=4096))
    evidence = collect(tmp_path)
    assert "not decided" in report.results(evidence, str(tmp_path))
    assert report.plot_differences(evidence, comparisons(evidence))
    assert report.plot_frontier(evidence)

def test_no_notebook_is_removed_where_none_can_be_made(tmp_path, monkeypatch):
    notebook = make(tmp_path).with_suffix(".ipynb")
    notebook.write_text("executed")
    monkeypatch.setattr(sweep, "NOTEBOOK", tmp_path / "nowhere.ipynb")
    with pytest.raises(ValueError, match="is not next to the package"): report.render(str(tmp_path))
    assert notebook.exists()

def test_the_best_epoch_is_that_of_the_best_run(tmp_path):
    make(tmp_path, 0, error=5.0)
    make(tmp_path, 1, row=dict(test_error=5.2))  # in both epochs: the better run, though not the best epoch
    table = report.best_of_table(collect(tmp_path), [("digits", "alexnet", "fixed-16")])
    assert "| 2 | 5.35 | 5.20 | 5.20 | 0.15 |" in table

def test_what_is_said_of_time_comes_from_the_benchmark(tmp_path):
    times = dict(samples=1000, predicted=[[3.0], [2.0]], seen=[[2.0, 1.1], [1.0, 2.0]])
    raw = dict(machine=dict(device="cpu (made up)"), schedules=dict(alexnet=times))
    make(tmp_path), make(tmp_path, schedule="adabatch")
    for text, said in ((json.dumps(raw), True), ("{", False), ("[]", False)):
        (tmp_path / "benchmark.json").write_text(text)
        answers = report.answers(collect(tmp_path), tmp_path)
        assert ("alexnet 1.03 times as fast, with CIFAR's batch sizes (made up; one" in answers) == said

@pytest.mark.parametrize("speed_ups, rounds, said", [
    ((2.2, 1.3, 1.2, 1.2), 2, True), ((2.2, 1.3, 1.2, 1.2), 1, False), ((1.3, 1.3, 1.2, 1.2), 2, False),
    ((2.2, 1.1, 1.0, 1.0), 2, False), ((2.2, 1.6, 1.2, 1.2), 2, False)])
def test_two_nodes_are_spoken_of_as_far_as_rounds_agree(tmp_path, speed_ups, rounds, said):
    make(tmp_path), make(tmp_path, schedule="adabatch")
    rates = 100, 1000, 10_000, 0
    gains = [dict(network="alexnet", rate=rate, seen=[gain, gain + 0.2] * rounds)
             for rate, gain in zip(rates, speed_ups)]
    gains.append(dict(network="resnet20", rate=100, seen=[1.0, 1.02]))
    (tmp_path / "network.json").write_text(json.dumps(dict(gains=gains)))
    assert ("emulation of two nodes" in report.answers(collect(tmp_path), tmp_path)) == said

def test_epochs_that_both_arms_share_are_counted(tmp_path):
    make(tmp_path)
    make(tmp_path, schedule="adabatch")
    assert report.shared_epochs(collect(tmp_path), C) == 2
    make(tmp_path, seed=1)
    make(tmp_path, seed=1, error=5.5, schedule="adabatch")
    assert report.shared_epochs(collect(tmp_path), C) == 0

def test_the_readme_is_rewritten_between_its_markers_only(tmp_path, capsys):
    for seed in range(2):
        make(tmp_path / "outputs", seed, dataset="cifar10")
        make(tmp_path / "outputs", seed, dataset="cifar10", schedule="adabatch")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nformer\n<!-- /results -->\nafter\n")
    assert report.main([str(tmp_path / "outputs"), str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "former" not in text and "32 → 32" in text
    assert (tmp_path / "outputs/results.png").exists() and "rewritten" in capsys.readouterr().out
    readme.write_text("nothing")
    assert report.main([str(tmp_path / "outputs"), str(readme)]) == 2 and readme.read_text() == "nothing"

def test_links_of_a_table_lead_to_the_records():
    evidence = collect("outputs")
    targets = re.findall(r"\]\((.*?)\)", report.arms_table(evidence, sorted(evidence.runs), "outputs/"))
    assert targets and all(Path(target).is_file() for target in targets)

def run_report(folder, tmp_path):
    import papermill
    parameters = dict(output_dir=str(folder.resolve()))
    papermill.execute_notebook("nbs/report.ipynb", tmp_path / "report.ipynb", parameters, progress_bar=False)
    return (tmp_path / "report.ipynb").read_text()

def test_the_report_executes_on_nothing_and_names_what_is_damaged(tmp_path):
    (tmp_path / "empty").mkdir()
    text = run_report(tmp_path / "empty", tmp_path)
    assert "0 records: none" in text and "Nothing was run yet" in text and "image/png" not in text
    make(tmp_path / "some")
    make(tmp_path / "some", seed=1).write_bytes(b"torn")
    text = run_report(tmp_path / "some", tmp_path)
    assert "1 records: 1 on digits" in text and "left out: 1" in text and "fixed-16-seed1.npz: damaged" in text

def test_the_report_executes_on_the_evidence(tmp_path):
    evidence = collect("outputs")
    text = run_report(Path("outputs"), tmp_path)
    assert f"{sum(map(len, evidence.runs.values()))} records" in text and evidence.left_out == []
    outputs = [o for cell in json.loads(text)["cells"] for o in cell.get("outputs", ())]
    figures = [o for o in outputs if "image/png" in o.get("data", ())]
    assert figures and all(o["metadata"]["image/png"]["alt"] for o in figures)
