import shutil

import numpy as np
import pytest
from scipy import stats

from adabatch import record
from adabatch.analysis import (
    PAPER, Comparison, Spread, collect, compare, compare_control, comparisons, endpoint, judge, paired_interval, pool)
from adabatch.experiment import Experiment, resolve

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

def by_seed(values): return dict(enumerate(values))

def lasting(errors, lr, sizes=None, status="complete"):
    sizes = np.array(sizes or [16] * len(lr))
    arrays = dict(test_error=np.array(errors, float), lr=np.array(lr, float), batch_size=sizes)
    return record.Record(arrays, {}, {}, status)

def test_the_endpoint_lies_behind_the_last_milestone():
    assert endpoint(lasting([9, 9, 9, 5, 4, 3, 2, 1], [1] * 8)) == 3
    assert endpoint(lasting([9, 9, 9, 9, 9, 3, 2, 1], [1] * 5 + [0.5] * 3)) == 2
    assert endpoint(lasting([9, 1], [1, 0.5])) == 1
    assert endpoint(lasting([9, 9, 9, 1, 1], [1] * 5, [16, 16, 16, 32, 32])) == 1  # growth alone

def test_a_run_that_diverged_decides_nothing_and_widens_no_other_interval():
    assert np.isnan(endpoint(lasting([9, 9, 90], [1] * 3, status="diverged")))
    assert pool([[1.0, 2.0, np.nan], [4.0, np.nan]]) == pool([[1.0, 2.0]])

def test_a_folder_that_is_named_as_a_data_set_ends_no_report(tmp_path):
    folder = tmp_path / "mine/cifar10"
    folder.mkdir(parents=True)
    make(tmp_path, dataset=str(folder), model="resnet50")
    assert list(collect(tmp_path).runs) == [("cifar10", "resnet50", "fixed-256")] and not comparisons(collect(tmp_path))

def test_the_intervals_are_those_of_two_one_sided_tests():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.standard_normal((2, 5))
        margin = rng.uniform(0.2, 2)
        spread = pool([a, b])
        for bound, side in ((-margin, "greater"), (margin, "less")):  # Student's test has the pooled spread of two arms
            test = stats.ttest_ind(a - bound, b, alternative=side)
            end = a.mean() - b.mean() + (-1 if side == "greater" else 1) * spread.half_width(5, 5)
            assert (test.pvalue < 0.05) == (end > bound if side == "greater" else end < bound)
        low, high = paired_interval(a - b)
        assert (stats.ttest_1samp(a - b, -margin, alternative="greater").pvalue < 0.05) == (low > -margin)
        assert (stats.ttest_1samp(a - b, margin, alternative="less").pvalue < 0.05) == (high < margin)

CLOSE, WIDE = Spread(0.3, 6), Spread(3.0, 6)

@pytest.mark.parametrize("a, b, spread, word, early", [
    ([], [1.0], CLOSE, "not decided", False),
    ([8.1, 8.0, 8.2, 8.1], [8.0, 8.1, 8.0, 8.2], CLOSE, "holds", False),
    ([8.1, 8.0, 8.2, 8.1], [8.0, 8.1, 8.0, 8.2], WIDE, "not decided", False),  # the pooled interval is wide
    ([8.1, 6.0, 10.2, 8.1], [8.0, 8.1, 8.0, 8.2], CLOSE, "not decided", False),  # the paired one is
    ([8.1, 8.0, 8.2], [8.0, 8.1, 8.0], CLOSE, "not decided", False),  # three pairs are no four
    ([8.1, 8.0, 8.2, 8.1], [8.0, 8.1, 8.0, 8.2], Spread(0.3, 3), "not decided", False),  # three degrees
    ([18.1, 18.0, 18.2, 18.1], [8.0, 8.1, 8.0, 8.2], CLOSE, "fails", False),
    ([18.0], [8.0], CLOSE, "fails", True),
    ([10.5], [8.0], CLOSE, "not decided", False),  # 2.5 - 1 is less than t s sqrt(2), of a level of 99 %
    ([10.7], [8.0], CLOSE, "fails", True),
    ([8.0] * 4, [8.0] * 4, CLOSE, "not decided", False),  # equal runs have no spread
    ([float("nan")] * 4, [8.0, 8.1, 8.0, 8.2], CLOSE, "not decided", False),  # diverged
])
def test_within_one_point(a, b, spread, word, early):
    v = judge(by_seed(a), by_seed(b), -1, 1, spread)
    assert (v.word, v.early) == (word, early)

@pytest.mark.parametrize("a, b, word, early", [
    ([9.7], [8.0], "holds", True),
    ([9.5], [8.0], "not decided", False),
    ([6.3], [8.0], "fails", True),
    ([9.0, 9.1, 8.9, 9.2], [8.0, 8.1, 8.0, 8.2], "holds", False),
    ([8.1, 8.0, 8.2, 8.1], [8.0, 8.1, 8.0, 8.2], "not decided", False),
])
def test_ends_higher(a, b, word, early):
    v = judge(by_seed(a), by_seed(b), 0, np.inf, CLOSE)
    assert (v.word, v.early) == (word, early)

def test_pairs_are_seeds_that_both_arms_have_and_others_count_only_without_any():
    a = {3: 8.1, 0: 8.0, 7: 1.0}
    v = judge(a, {0: 8.0, 3: 8.0}, -1, 1, CLOSE)
    assert (v.pairs, v.n, v.difference) == (2, "2 pairs", pytest.approx(0.05))
    assert v.paired == pytest.approx(paired_interval([0.0, 0.1]))
    v = judge(a, {1: 8.0, 2: 8.0}, -1, 1, CLOSE)
    assert (v.pairs, v.n, v.difference, v.paired) == (0, "3 and 2 runs", pytest.approx(-2.3), None)

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
    config = foreign.config | dict(model="mlp")  # of a network that has no recipe here
    record.save(good.with_name("fixed-16-seed6.npz"), rows, config, foreign.environment, "complete")
    evidence = collect(tmp_path)
    key = "digits", "alexnet", "fixed-16"
    assert list(evidence.runs) == [key] and list(evidence.runs[key]) == [0]
    reasons = [
        "damaged, or no record of an experiment", "not where its settings belong",
        "not all epochs were divided as the arm says", "another momentum than the recipe's",
        *["damaged, or no record of an experiment"] * 2]
    names = [f"digits/alexnet/fixed-16-seed{seed}.npz" for seed in range(1, 7)]
    assert evidence.left_out == [f"{name}: {reason}" for name, reason in zip(names, reasons)]

def test_a_large_batch_is_judged_by_the_spread_of_large_batches(tmp_path):
    for seed in range(5):
        make(tmp_path, seed, error=5.0 + 0.1 * seed)
        make(tmp_path, seed, error=5.1 + 0.1 * seed, schedule="adabatch")
        make(tmp_path, seed, error=50.0 + 10 * seed, batch_size=256)
    make(tmp_path, dataset="cifar10", error=20.0)
    make(tmp_path, dataset="cifar10", error=20.0, schedule="adabatch")
    make(tmp_path, dataset="cifar10", error=40.0, batch_size=4096)
    evidence = collect(tmp_path)
    assert compare(evidence, Comparison("digits", "alexnet"), "large").word == "holds"
    assert compare(evidence, PAPER, "large").word == "not decided"  # large batches scatter by 16 points on digits
    assert compare(evidence, PAPER).pooled is None  # and the small batches of digits do not stand for CIFAR's

def test_controls_are_compared_with_adabatch(tmp_path):
    for seed in range(4):
        make(tmp_path, seed, error=20 + 0.1 * seed, schedule="adabatch", dataset="cifar10")
        make(tmp_path, seed, error=20.2 + 0.1 * seed, dataset="cifar10")
    for seed in (0, 7): make(tmp_path, seed, error=26.0, dataset="cifar10", batch_size=640, lr=0.025)
    evidence = collect(tmp_path)
    for role, difference in (("adaptive", 6), ("small", 5.8)):
        v = compare_control(evidence, "constant batch", role)
        assert (v.word, v.early, v.runs) == ("holds", True, (1, 1)) and v.difference == pytest.approx(difference)
    assert compare_control(evidence, "39 epochs, early decay").word == "not decided"

def test_a_scaled_rate_is_judged_by_the_spread_of_large_batches(tmp_path):
    for seed in range(4):
        make(tmp_path, seed, error=20 + 0.1 * seed, schedule="adabatch", dataset="cifar10")
        make(tmp_path, seed, error=20.2 + 0.1 * seed, dataset="cifar10")
        for arm in (dict(schedule="adabatch"), {}, dict(batch_size=256)): make(tmp_path, seed, 50 + seed, **arm)
    for seed, error in ((0, 30.0), (1, 44.0)):
        make(tmp_path, seed, error, dataset="cifar10", batch_size=4096, warmup_epochs=5)
    v = compare_control(collect(tmp_path), "scaled rate")
    assert (v.word, v.runs) == ("not decided", (2, 2)) and v.pooled[1] - v.pooled[0] > 15

def test_a_control_of_twenty_epochs_is_compared_with_adabatch_of_twenty(tmp_path):
    fifth = dict(dataset="cifar10", epochs=20, every=4)
    for seed in range(4):
        make(tmp_path, seed, error=20 + 0.1 * seed, schedule="adabatch", dataset="cifar10")
        make(tmp_path, seed, error=40 + 0.1 * seed, schedule="adabatch", **fifth)
        make(tmp_path, seed, error=40.2 + 0.1 * seed, **fifth)
        make(tmp_path, seed, error=40.5 + 0.12 * seed, batch_size=640, lr=0.025, **fifth)
    v = compare_control(collect(tmp_path), "constant batch, 20 epochs")
    assert v.difference == pytest.approx(0.53) and (v.n, v.word, v.early) == ("4 pairs", "holds", False)
