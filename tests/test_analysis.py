import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from adabatch import analysis, record
from adabatch.analysis import collect, interval, judge, speed_claim
from adabatch.experiment import Experiment, resolve

PUBLISHED = [8.2, 8.4, 8.1, 8.6, 8.3], [8.5, 8.2, 8.4, 8.9, 8.6, 8.3]


def make(folder, seed=0, error=5.0, row=(), made=(), **settings):
    "A record of two epochs; `row` and `made` go into its epochs and its environment, `settings` into the experiment."
    e = resolve(Experiment(**dict(model="alexnet", dataset="digits", schedule="fixed", seed=seed, device="cpu", output_dir=str(folder)) | settings))
    counts = dict.fromkeys(record.COUNTS, 16) | dict(processes=e.experiment.processes, micro_batch=e.experiment.micro_batch or 16)
    rows = [dict.fromkeys(record.CLOCKS, 1.0) | counts | dict.fromkeys(record.MEASURES, 1.0) | dict(test_error=error + 1 - epoch) | dict(row) for epoch in range(2)]
    environment = dict(device="none", clock="perf_counter", threads=1, torch="2", compile=False, commit="none") | dict(made)
    record.save(e.path, rows, e.config, environment, "complete")
    return e.path


def test_the_interval_is_welchs():
    a, b = map(np.array, PUBLISHED)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = stats.t.ppf(0.95, dof) * (va + vb) ** 0.5
    assert interval(a, b) == pytest.approx((a.mean() - b.mean() - half, a.mean() - b.mean() + half))


def test_within_is_two_one_sided_tests():
    a, b = map(np.array, PUBLISHED)
    for margin in (0.2, 0.3, 0.4, 0.5, 1.0):
        p = max(stats.ttest_ind(a, b - margin, equal_var=False, alternative="greater").pvalue, stats.ttest_ind(a, b + margin, equal_var=False, alternative="less").pvalue)
        assert (judge(a, b, -margin, margin)[0] == "holds") == (p < 0.05)
    assert judge(a, b, -1, 1)[0] == "holds" and judge(a, b, -0.2, 0.2)[0] == "not decided"


@pytest.mark.parametrize("a, b, verdict", [([], [1.0], "not decided"), ([8.0], [8.0], "not decided"), ([8.0, 8.0], [8.0, 8.0], "not decided"), ([8.0, 8.1], [8.0, 8.1], "holds"), ([18.0, 18.1], [8.0, 8.1], "fails")])
def test_few_seeds_and_clear_cases(a, b, verdict):
    found, why = judge(a, b, -1, 1)
    assert found == verdict
    if len(a) < 2: assert "no runs" in why or "too few seeds" in why and "n = 1 and 1" in why


def test_damaged_misplaced_and_mixed_records_are_named_and_left_out(tmp_path):
    good = make(tmp_path)
    torn = make(tmp_path, seed=1)
    torn.write_bytes(torn.read_bytes()[:500])
    shutil.copy(good, good.with_name("fixed-16-seed2.npz"))
    make(tmp_path, seed=3, row=dict(processes=3))
    make(tmp_path, seed=4, momentum=0.5)
    foreign = record.load(good)
    rows = [{n: v[epoch] for n, v in foreign.arrays.items()} for epoch in range(2)]
    record.save(good.with_name("fixed-16-seed5.npz"), rows, {"model": "lenet"}, foreign.environment, "complete")
    evidence = collect(tmp_path)
    assert list(evidence.runs) == [("digits", "alexnet", "fixed-16")] and list(evidence.runs["digits", "alexnet", "fixed-16"]) == [0]
    assert evidence.left_out == ["digits/alexnet/fixed-16-seed1.npz: damaged, or no record of an experiment", "digits/alexnet/fixed-16-seed2.npz: not where its settings belong",
                                 "digits/alexnet/fixed-16-seed3.npz: not all epochs were cut as the arm says", "digits/alexnet/fixed-16-seed4.npz: another momentum than the recipe's",
                                 "digits/alexnet/fixed-16-seed5.npz: damaged, or no record of an experiment"]


def test_only_runs_made_alike_are_compared_in_speed(tmp_path):
    def verdict(): return speed_claim(collect(tmp_path), "digits", "alexnet", "fixed-16", "adabatch-16-256", 1.5)[2:]
    def gpu(name, seconds, seed, **settings): make(tmp_path, seed, made=dict(device=name, clock="CUDA events"), row=dict(forward_seconds=seconds + 0.01 * seed), **settings)
    for seed in range(2):
        gpu("slow", 3.0, seed)
        gpu("fast", 1.0, seed, schedule="adabatch")
    assert verdict() == ("no runs on one and the same GPU", "not decided")
    for seed in (2, 3): gpu("fast", 2.0, seed)
    measured, found = verdict()
    assert found == "holds" and measured.startswith("1.5") and "fast, 1 threads" in measured
    assert speed_claim(collect(tmp_path), "digits", "alexnet", "fixed-16", "adabatch-16-256", 3.0)[3] == "fails"


def test_tables_show_what_is_missing_and_where_a_number_is_from(tmp_path):
    for seed, error in enumerate((4.0, 6.0)): make(tmp_path, seed=seed, error=error)
    evidence = collect(tmp_path)
    lines = {line.split(" | ")[1]: line for line in analysis.error_table(evidence, "digits", {"alexnet": {"fixed-16": {"final_test_error": 7.5}}}, models=["alexnet"]).splitlines()[2:]}
    assert "| 7.50 | 5.00 ± 1.41 (n=2) | 2 |" in lines["fixed-16"] and "digits/alexnet/fixed-16-seed*.npz" in lines["fixed-16"]
    assert "missing" in lines["fixed-256"] and "missing" in lines["adabatch-16-256"]
    assert "1 of 5" in analysis.coverage(collect(make(tmp_path / "other", dataset="cifar10").parents[2]), "paper", 5)


def run_report(folder, tmp_path):
    import papermill
    papermill.execute_notebook("nbs/report.ipynb", tmp_path / "report.ipynb", dict(output_dir=str(folder.resolve())), progress_bar=False)
    return (tmp_path / "report.ipynb").read_text()


def test_the_report_executes_on_nothing_and_names_what_is_damaged(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "0 records: none, everything below is missing" in run_report(tmp_path / "empty", tmp_path)
    make(tmp_path / "some")
    make(tmp_path / "some", seed=1).write_bytes(b"torn")
    text = run_report(tmp_path / "some", tmp_path)
    assert "1 records: 1 on digits" in text and "left out: 1" in text and "fixed-16-seed1.npz: damaged" in text


def test_the_report_executes_on_the_evidence(tmp_path):
    evidence = collect("outputs")
    text = run_report(Path("outputs"), tmp_path)
    assert f"{sum(map(len, evidence.runs.values()))} records" in text and evidence.left_out == []
