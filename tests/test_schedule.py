import re
from pathlib import Path

import numpy as np
import pytest
import torch

from adabatch.data import Batches
from adabatch.schedule import Schedule, Stage, adabatch, fixed


def test_both_sides_of_every_milestone():
    schedule = adabatch(128, 2048, lr=0.01)
    for k in range(5):
        for epoch in (20 * k, 20 * k + 19):
            assert schedule.at(epoch) == Stage(20 * k, 128 * 2**k, pytest.approx(0.01 * 0.75**k))
    assert [schedule.updates(e, 50_000) for e in (0, 19, 20, 39, 40, 59, 60, 79, 80, 99)] == [390, 390, 195, 195, 97, 97, 48, 48, 24, 24]
    assert schedule.epochs == 100
    for outside in (-1, 100):
        with pytest.raises(ValueError, match="outside"):
            schedule.at(outside)


def test_fixed_decays_by_the_effective_decay():
    schedule = fixed(128, lr=0.01)
    assert {s.batch_size for s in schedule.stages} == {128}
    assert [s.lr for s in schedule.stages] == pytest.approx([0.01 * 0.375**k for k in range(5)])


def test_last_stage_may_be_short_and_growth_may_end_early():
    assert [s.epoch for s in adabatch(16, 256, lr=0.1, every=4, epochs=10).stages] == [0, 4, 8]
    stages = adabatch(16, 32, lr=1.0, every=1, epochs=4).stages
    assert [s.lr for s in stages] == pytest.approx([1, 0.75, 0.75 * 0.375, 0.75 * 0.375**2])


def test_growth_by_other_factors():
    assert [s.batch_size for s in adabatch(10, 1000, lr=0.1, growth=10, every=1, epochs=3).stages] == [10, 100, 1000]
    assert [s.batch_size for s in adabatch(3, 3 * 5**12, lr=0.1, growth=5, every=1, epochs=13).stages][-1] == 3 * 5**12


def test_warmup_ends_at_the_scaled_rate():
    schedule = fixed(2048, lr=0.01, warmup_epochs=5, base_batch_size=128)
    ramp = [schedule.lr(e, f) for e in range(6) for f in (0, 0.5)]
    assert ramp[0] == 0.01 and ramp[10] == ramp[11] == pytest.approx(0.16)
    assert np.diff(ramp[:11]) == pytest.approx([0.015] * 10)


@pytest.mark.parametrize("make, error, line", [
    (lambda: adabatch(-1, 2, lr=0.1), ValueError, "batch_size must be at least 1, not -1"),
    (lambda: adabatch(4, 24, lr=0.1), ValueError, r"max_batch_size \(24\) is not batch_size \(4\) times a power of growth \(2\)"),
    (lambda: adabatch(4, 8, lr=0.1, growth=1), ValueError, "growth must be at least 2"),
    (lambda: adabatch(4, 8, lr=0.1, epochs=0), ValueError, "epochs must be at least 1"),
    (lambda: adabatch(4, 8, lr=float("nan")), ValueError, "lr must be positive and finite"),
    (lambda: fixed(True, lr=0.1), TypeError, "batch_size must be a whole number, not True"),
    (lambda: fixed(4.0, lr=0.1), TypeError, "batch_size must be a whole number"),
    (lambda: fixed(4, lr="0.1"), TypeError, "lr must be a number"),
    (lambda: fixed(4, lr=0.1, warmup_epochs=30, base_batch_size=4), ValueError, "must end before the first milestone"),
])
def test_bad_numbers(make, error, line):
    with pytest.raises(error, match=line):
        make()


def test_values():
    a, b = adabatch(16, 64, lr=0.1), adabatch(16, 64, lr=0.1)
    assert a == b and hash(a) == hash(b)
    with pytest.raises(AttributeError):
        a.epochs = 3
    assert isinstance(a, Schedule)


def test_the_loop_in_the_readme_runs():
    loop = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    dataset = torch.utils.data.TensorDataset(torch.randn(300, 4), torch.randint(2, (300,)))
    model = torch.nn.Linear(4, 2)
    seen = []

    def train_step(x, y):
        seen.append((len(x), names["optimizer"].param_groups[0]["lr"]))

    names = dict(dataset=dataset, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), train_step=train_step, torch=torch, Batches=Batches)
    exec(loop.replace("adabatch(128, 2048, lr=0.01)", "adabatch(16, 64, lr=0.01, every=1, epochs=3)"), names)
    assert [size for size, _ in seen] == [16] * 18 + [12] + [32] * 9 + [12] + [64] * 4 + [44]
    assert seen[-1][1] == pytest.approx(0.01 * 0.75**2)
