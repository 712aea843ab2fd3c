import json
import re
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
    where = dict(model="alexnet", dataset="digits", schedule="fixed", device="cpu", output_dir=str(folder))
    run = resolve(Experiment(**where | dict(seed=seed) | settings))
    e, numbers = run.experiment, dict.fromkeys(record.CLOCKS, 1.0) | dict.fromkeys(record.MEASURES, 1.0)
    numbers |= dict.fromkeys(record.COUNTS, 16) | dict(processes=e.processes, micro_batch=e.micro_batch or 16)
    rows = [numbers | dict(test_error=error + 1 - epoch) | dict(row) for epoch in range(2)]
    environment = dict(device="none", clock="perf_counter", threads=1, torch="2", compile=False, commit="none")
    record.save(run.path, rows, run.config, environment | dict(made), "complete")
    return run.path


def test_the_interval_is_welchs():
    a, b = map(np.array, PUBLISHED)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = stats.t.ppf(0.95, dof) * (va + vb) ** 0.5
    assert interval(a, b) == pytest.approx((a.mean() - b.mean() - half, a.mean() - b.mean() + half))


def test_within_is_two_one_sided_tests():
    a, b = map(np.array, PUBLISHED)
    for margin in (0.2, 0.3, 0.4, 0.5, 1.0):
        above = stats.ttest_ind(a, b - margin, equal_var=False, alternative="greater").pvalue
        below = stats.ttest_ind(a, b + margin, equal_var=False, alternative="less").pvalue
        p = max(above, below)
        assert (judge(a, b, -margin, margin)[0] == "holds") == (p < 0.05)
    assert judge(a, b, -1, 1)[0] == "holds" and judge(a, b, -0.2, 0.2)[0] == "not decided"


def by_seed(values, first=0):
    return dict(enumerate(values, first))


def test_where_all_seeds_are_shared_the_paired_test_decides():
    a, b = map(np.array, PUBLISHED)
    small, growing = 10 * a, 10 * a + b[:5] / 10  # seeds scatter together
    for margin in (0.84, 0.85, 0.86, 0.87, 0.88, 0.9, 1.0):
        above = stats.ttest_1samp(growing - small + margin, 0, alternative="greater").pvalue
        below = stats.ttest_1samp(growing - small - margin, 0, alternative="less").pvalue
        assert (judge(by_seed(growing), by_seed(small), -margin, margin)[0] == "holds") == (max(above, below) < 0.05)
    verdict, text = judge(by_seed(growing), by_seed(small), -1, 1)
    assert verdict == "holds" and "n = 5 pairs (Welch: " in text
    shuffled = {seed: small[seed] for seed in (3, 1, 4, 0, 2)}
    assert judge(by_seed(growing), shuffled, -1, 1) == (verdict, text)


def test_without_the_same_seeds_welchs_test_decides():
    a, b = map(np.array, PUBLISHED)
    small, growing = 10 * a, 10 * a + b[:5] / 10
    for other in (by_seed(small, first=1), by_seed(small[:4]), list(small)):
        values = list(other.values()) if isinstance(other, dict) else other
        assert judge(by_seed(growing), other, -1, 1) == judge(list(growing), values, -1, 1)
        assert judge(by_seed(growing), other, -1, 1)[0] == "not decided"


@pytest.mark.parametrize(
    "a, b, verdict",
    [
        ([], [1.0], "not decided"),
        ([8.0], [8.0], "not decided"),
        ([8.0, 8.0], [8.0, 8.0], "not decided"),
        ([8.0, 8.1], [8.0, 8.1], "holds"),
        ([18.0, 18.1], [8.0, 8.1], "fails"),
    ],
)
def test_few_seeds_and_clear_cases(a, b, verdict):
    found, why = judge(a, b, -1, 1)
    assert found == verdict
    if len(a) < 2:
        assert "no runs" in why or "too few seeds" in why and "n = 1 and 1" in why


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
    key = "digits", "alexnet", "fixed-16"
    assert list(evidence.runs) == [key] and list(evidence.runs[key]) == [0]
    reasons = [
        "damaged, or no record of an experiment",
        "not where its settings belong",
        "not all epochs were divided as the arm says",
        "another momentum than the recipe's",
        "damaged, or no record of an experiment",
    ]
    names = [f"digits/alexnet/fixed-16-seed{seed}.npz" for seed in range(1, 6)]
    assert evidence.left_out == [f"{name}: {reason}" for name, reason in zip(names, reasons)]


def test_only_runs_with_the_same_setup_are_compared_in_speed(tmp_path):
    arms = "digits", "alexnet", "fixed-16", "adabatch-16-256"

    def verdict():
        claim = speed_claim(collect(tmp_path), *arms, 1.5)
        return claim.measured, claim.verdict

    def gpu(name, seconds, seed, **settings):
        made, row = dict(device=name, clock="CUDA events"), dict(forward_seconds=seconds + 0.01 * seed)
        make(tmp_path, seed, made=made, row=row, **settings)

    for seed in range(2):
        gpu("slow", 3.0, seed)
        gpu("fast", 1.0, seed, schedule="adabatch")
    assert verdict() == ("no runs on one and the same GPU", "not decided")
    for seed in (2, 3):
        gpu("fast", 2.0, seed)
    measured, found = verdict()
    assert found == "holds" and measured.startswith("1.5") and "fast, 1 threads" in measured
    assert speed_claim(collect(tmp_path), *arms, 3.0).verdict == "fails"


def test_tables_show_what_is_missing_and_where_a_number_is_from(tmp_path):
    for seed, error in enumerate((4.0, 6.0)):
        make(tmp_path, seed=seed, error=error)
    evidence = collect(tmp_path)
    table = analysis.arms_table(evidence, [("digits", "alexnet", arm) for arm in ("fixed-16", "fixed-256")], "../")
    assert "| 5.00 ± 1.41 (n=2) |" in table and "[1](../digits/alexnet/fixed-16-seed1.npz)" in table
    assert "fixed-256" not in table
    assert "| digits | alexnet | 2 of 5 | 0 of 5 | 0 of 5 | 0 of 5 |" in analysis.coverage(evidence, "digits", 5)
    assert "1 of 5" in analysis.coverage(collect(make(tmp_path / "other", dataset="cifar10").parents[2]), "paper", 5)


def test_minutes_come_from_records_of_the_same_network_or_are_unknown(tmp_path):
    make(tmp_path, row=dict(samples=100, train_seconds=8.0, test_seconds=2.0))  # a tenth of a second a sample
    table = analysis.not_run(collect(tmp_path), "digits", 1)
    lines = {line.split(" | ")[1]: line for line in table.splitlines()[2:]}
    command = "python -m adabatch.sweep --grid digits --dataset digits --model alexnet --seeds 1"
    assert f"| 3 | `{command}` |" in lines["alexnet"]
    assert f"| {3 * 10 * 1437 / 600:.0f} (none, from records of digits) |" in lines["alexnet"]
    assert "| 4 |" in lines["vgg19bn"] and "unknown" in lines["vgg19bn"]


def test_claims_are_made_of_what_was_run_only(tmp_path):
    for seed in range(3):
        make(tmp_path, seed, error=5.0 + seed)
        make(tmp_path, seed, error=15.0 + 1.1 * seed, schedule="adabatch", row=dict(updates=4))
    claims = {claim.kind: claim for claim in analysis.found_claims(collect(tmp_path))}
    verdicts = {kind: claim.verdict for kind, claim in claims.items()}
    assert verdicts == {"updates": "holds", "within": "fails", "rate": "holds"}
    assert claims["updates"].measured == "32 → 8: 4.0 times fewer"
    assert "It ends more than one point higher: alexnet on digits" in analysis.answers(collect(tmp_path))


def test_what_is_said_of_time_comes_from_the_benchmark(tmp_path):
    make(tmp_path)
    make(tmp_path, schedule="adabatch")
    assert "Does that save time?** Not shown: `make bench`" in analysis.answers(collect(tmp_path))
    times = dict(samples=1000, predicted=[[3.0], [2.0]], seen=[[2.0, 1.0], [1.0, 1.0]])
    raw = dict(machine=dict(device="cpu (made up)"), schedules=dict(alexnet=times))
    (tmp_path / "benchmark.json").write_text(json.dumps(raw))
    answers = analysis.answers(collect(tmp_path))
    assert "cpu (made up): alexnet 1.50 times as fast as the fixed batch (2 epochs of 1,000 images, " in answers
    assert "by epoch 1.00 to 2.00)" in answers
    (tmp_path / "benchmark.json").write_text("{")
    evidence = collect(tmp_path)
    assert evidence.left_out == ["benchmark.json: damaged"] and "Not shown" in analysis.answers(evidence)


def test_the_readme_is_rewritten_between_its_markers_only(tmp_path, capsys):
    for seed in range(2):
        make(tmp_path / "outputs", seed)
        make(tmp_path / "outputs", seed, schedule="adabatch")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    assert analysis.main([str(tmp_path / "outputs"), str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "32 → 32" in text
    assert (tmp_path / "outputs/results.png").exists() and "rewritten" in capsys.readouterr().out
    readme.write_text("nothing")
    assert analysis.main([str(tmp_path / "outputs"), str(readme)]) == 2 and readme.read_text() == "nothing"


def test_links_of_a_table_lead_to_the_records():
    evidence = collect("outputs")
    table = analysis.claims_table(evidence, analysis.found_claims(evidence), "outputs/")
    targets = re.findall(r"\]\((.*?)\)", table)
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
