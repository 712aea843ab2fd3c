import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from adabatch.loader import Plan
from adabatch.schedule import Curve, Schedule, Stage, adabatch, fixed, from_batch_sizes, from_lr_schedule

def test_both_sides_of_every_milestone():
    schedule = adabatch(128, 2048, lr=0.01)
    for k in range(5):
        for epoch in (20 * k, 20 * k + 19):
            assert schedule.at(epoch) == Stage(20 * k, 128 * 2**k, pytest.approx(0.01 * 0.75**k))
    assert schedule.epochs == 100
    for outside in (-1, 100):
        with pytest.raises(ValueError, match="outside"): schedule.at(outside)

@pytest.mark.filterwarnings("ignore:the batch ends at 64")
def test_last_stage_may_be_short_and_growth_may_end_early():
    assert [s.start for s in adabatch(16, 256, lr=0.1, every=4, epochs=10).stages] == [0, 4, 8]
    stages = adabatch(16, 32, lr=1.0, every=1, epochs=4).stages
    assert [s.lr for s in stages] == pytest.approx([1, 0.75, 0.75 * 0.375, 0.75 * 0.375**2])

def test_growth_by_other_factors():
    assert [s.batch_size for s in adabatch(10, 1000, lr=0.1, growth=10, every=1, epochs=3).stages] == [10, 100, 1000]
    assert [s.batch_size for s in adabatch(3, 3 * 5**12, lr=0.1, growth=5, every=1, epochs=13).stages][-1] == 3 * 5**12

def test_values():
    a, b = adabatch(16, 64, lr=0.1), adabatch(16, 64, lr=0.1)
    assert a == b and hash(a) == hash(b)
    with pytest.raises(AttributeError): a.epochs = 3
    assert isinstance(a, Schedule)

two = Schedule((Stage(0, 4, 0.1), Stage(2, 8, 0.1)), epochs=4)

@pytest.mark.parametrize("ask, error, line", [
    (lambda: adabatch(4, 24, lr=0.1), ValueError, r"\(24\) is not batch_size \(4\) times a power of growth \(2\)"),
    (lambda: fixed(True, lr=0.1), TypeError, "batch_size must be an integer, not True"),
    (lambda: fixed(4, lr="0.1"), TypeError, "lr must be a number"),
    (lambda: fixed(4, lr=0.1, warmup_epochs=30, base_batch_size=4), ValueError, "must end before the first milestone"),
    (lambda: two.at(2.5), TypeError, "epoch must be an integer, not 2.5"),
    (lambda: two.at("1"), TypeError, "epoch must be an integer, not '1'"),
    (lambda: two.at(True), TypeError, "epoch must be an integer"),
    (lambda: two.at(np.arange(3)), TypeError, "epoch must be an integer"),
    (lambda: two.at(0, 1.0), ValueError, "fraction must be at least 0 and less than 1"),
    (lambda: two.lr(0, float("nan")), ValueError, "fraction must be finite, not nan"),
    (lambda: two.lr(0, np.zeros(2)), TypeError, "fraction must be a number"),
    (lambda: two.lr(10**20), ValueError, "epoch must be at most"),
    (lambda: Schedule((), 3), ValueError, "1 to 10,000 stages, not 0"),
    (lambda: Schedule([(0, 4, 0.1)], 3), TypeError, r"stages must be a list of Stage\(start, batch_size, lr\)"),
    (lambda: Schedule((Stage(1, 4, 0.1),), 3), ValueError, "first stage must begin at 0, not at 1"),
    (lambda: Schedule((Stage(0, 4, 0.1), Stage(2, 4, 0.1), Stage(2, 4, 0.1)), 3), ValueError, "2 follows 2"),
    (lambda: Schedule((Stage(0, 4.5, 0.1),), 3), TypeError, "batch_size must be an integer"),
    (lambda: Schedule((Stage(0, 4, 0.0),), 3), ValueError, "learning rate at 0 epochs must be positive and finite"),
    (lambda: Schedule((Stage(0, 4, 0.1),), 3, warmup_lr=math.inf), ValueError, "warmup_lr must be finite"),
    (lambda: replace(from_lr_schedule(lambda p: 1.1 - p, 4, 8, 10), warmup_epochs=1), ValueError, "sets all"),
    (lambda: adabatch(4, 8, lr=[0.1, 0.2]), TypeError, "lr must be a number"),
    (lambda: adabatch(4, 8, lr=np.array([0.1])), TypeError, "lr must be a number"),
    (lambda: adabatch(4, 8, lr=10**400), ValueError, "lr must be positive and finite"),
    (lambda: adabatch(10**4000, 10**4001, lr=0.1), ValueError, "batch_size must be at most 9007199254740992"),
    (lambda: adabatch(4, 8, lr=0.1, epochs=10**12), ValueError, "10,000 stages: raise every, or give milestones"),
    (lambda: adabatch(4, 8, lr=0.1, epochs=10**20), ValueError, "epochs must be at most"),
    (lambda: fixed(4, lr=0.1, lr_decay=1e-300), ValueError, "learning rate at 40 epochs must be positive"),
    (lambda: fixed(2**53, lr=1e300, warmup_epochs=1, base_batch_size=1), ValueError, "learning rate at 0"),
    (lambda: adabatch(4, 8, lr=0.1, growth=math.nan), ValueError, "growth must be finite"),
    (lambda: adabatch(4, 8, lr=0.1, growth=1 + 1e-12), ValueError, "too close to 1"),
    (lambda: adabatch(4, 8, lr=0.1, milestones="60"), TypeError, "milestones must be a list"),
    (lambda: adabatch(4, 8, lr=0.1, milestones=60), TypeError, "milestones must be a list"),
    (lambda: adabatch(4, 8, lr=0.1, milestones=[60, 60]), ValueError, "must be positive and increase"),
    (lambda: adabatch(4, 8, lr=0.1, milestones=[0, 60]), ValueError, "must be positive and increase"),
    (lambda: adabatch(4, 8, lr=0.1, milestones=["60"]), TypeError, "a milestone must be a number, not '60'"),
    (lambda: from_lr_schedule(0.1, 4, 8, 10), TypeError, "curve must be a function of progress or a scheduler"),
    (lambda: from_lr_schedule(lambda p: "0.1", 4, 8, 10), TypeError, "curve must be a number"),
    (lambda: from_lr_schedule(lambda p: math.inf, 4, 8, 10), ValueError, "curve must be finite"),
    (lambda: from_lr_schedule(lambda p: 0.0, 4, 4, 10), ValueError, "learning rate at 0 epochs must be positive"),
    (lambda: from_lr_schedule(lambda p: 0.5 - p, 4, 8, 10), ValueError, "negative"),
    (lambda: from_lr_schedule(lambda p: 0.1, 4, 8, 10, rule=2), ValueError, "linear, sqrt or a power from 0 to 1"),
    (lambda: from_lr_schedule(lambda p: 0.1, 4, 8, 10, rule="cubic"), TypeError, "must be a number, not 'cubic'"),
    (lambda: adabatch(3, 256, lr=0.1), ValueError, "the nearest are 192 and 384"),
    (lambda: from_batch_sizes(64, 10, 0.1), TypeError, "batch_size must be a function of the epoch, not 64"),
    (lambda: from_batch_sizes(lambda e: 0.2, 10, 0.1), ValueError, "batch_size must be at least 1, not 0"),
    (lambda: from_batch_sizes(lambda e: None, 10, 0.1), TypeError, "the batch size must be a number, not None"),
    (lambda: from_batch_sizes(lambda e: 64, 10**6, 0.1), ValueError, "epochs must be at most 10000"),
    (lambda: from_batch_sizes(lambda e: 64, 10, lambda e: 0.3 - 0.1 * e), ValueError, "at 3 epochs must be positive"),
    (lambda: fixed(2048, lr=0.1, warmup_epochs=5), ValueError, "give base_batch_size"),
    (lambda: fixed(-(10**5000), lr=0.1), ValueError, "not a number with thousands of digits"),
])
def test_one_line_says_what_is_wrong(ask, error, line):
    with pytest.raises(error, match=line) as caught: ask()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250

def test_irregular_milestones_and_fractional_growth():
    schedule = adabatch(100, 400, lr=0.1, lr_decay=0.75, growth=1.5, milestones=[60, 120, 160, 180, 300], epochs=200)
    sizes = [(s.start, s.batch_size) for s in schedule.stages]
    assert sizes == [(0, 100), (60, 150), (120, 225), (160, 338), (180, 400)]
    rates = [s.lr / s.batch_size for s in schedule.stages]
    assert [b / a for a, b in zip(rates, rates[1:])] == pytest.approx([0.5] * 4, rel=1e-14)
    steps = fixed(8, lr=1.0, lr_decay=0.5, milestones=[3, 4], epochs=9)
    assert steps.stages == (Stage(0, 8, 1.0), Stage(3, 8, 0.5), Stage(4, 8, 0.25))
    assert adabatch(16, 64, lr=0.1, growth=2.0) == adabatch(16, 64, lr=0.1)
    assert adabatch(16, 64, lr=0.1, milestones=range(20, 100, 20)) == adabatch(16, 64, lr=0.1)

def optimizer(lr): return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)

def warm_up_then_decay(o):
    parts = lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)
    return lr_scheduler.SequentialLR(o, parts, [5])

SCHEDULERS = {
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, 40), 40),
    "step": (lambda o: lr_scheduler.StepLR(o, 10, gamma=0.1), 40),
    "stable, then down": (lambda o: lr_scheduler.LambdaLR(o, lambda k: min((k + 1) / 5, 1, (42 - k) / 20)), 40),
    "polynomial": (lambda o: lr_scheduler.PolynomialLR(o, 400, power=2), 400),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=400), 400),
    "sequential": (warm_up_then_decay, 40),
}

@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule, power", [("linear", 1), ("sqrt", 0.5), (0.75, 0.75)])
def test_pytorchs_schedulers(name, rule, power):
    make, steps = SCHEDULERS[name]
    (a, b), epochs = (optimizer(0.1), optimizer(0.1)), 40
    given, own = make(a), make(b)
    before = a.state_dict(), repr(given.state_dict())
    schedule = from_lr_schedule(given, 16, 256, epochs, rule=rule, steps=None if steps == epochs else steps)
    assert (a.state_dict(), repr(given.state_dict())) == before
    sizes, expected = [], []
    for step in range(steps):
        if step:
            b.step()
            own.step()
        expected.append(b.param_groups[0]["lr"] / 16**power)
        stage = schedule.at(step * epochs // steps, step * epochs % steps / steps)
        sizes.append(stage.batch_size)
    rates = [schedule.lr(k * epochs // steps, k * epochs % steps / steps) / size**power for k, size in enumerate(sizes)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert sizes == sorted(sizes) and sizes[0] == 16 and len(set(sizes)) >= 3
    lowest = sizes.index(32)  # the batch is doubled as soon as the curve is at half its peak, no earlier
    assert expected[lowest] <= max(expected) / 2 * (1 + 1e-9) < expected[lowest - 1]

def test_a_scheduler_without_a_curve():
    with pytest.raises(TypeError, match="ReduceLROnPlateau depends on the course of training, so it has no curve"):
        from_lr_schedule(lr_scheduler.ReduceLROnPlateau(optimizer(0.1)), 16, 32, 10)
    with pytest.raises(TypeError, match="unsupported operand"):  # a defect of the caller's is not hidden
        from_lr_schedule(lr_scheduler.LambdaLR(optimizer(0.1), lambda k: 1 / (k and "2" or 1)), 16, 32, 10)
    stepped = lr_scheduler.StepLR(optimizer(0.1), 3)
    stepped.optimizer.step()
    stepped.step()
    with pytest.raises(ValueError, match="already been stepped"): from_lr_schedule(stepped, 16, 32, 10)

@pytest.mark.parametrize("decay, growth", [(0.375, 2), (0.1, 2), (0.5, 2), (0.1, 10), (0.2, 3), (0.4, 1.5)])
def test_adabatch_is_the_linear_rule_on_a_step_decay(decay, growth):
    top = round(16 * growth**3) if isinstance(growth, int) else 50
    ours = adabatch(16, top, lr=0.1, lr_decay=decay * growth, growth=growth, every=7, epochs=40)
    def function(p): return 0.1 * decay ** (math.floor(p * 40 + 1e-9) // 7)
    for curve in (function, lr_scheduler.StepLR(optimizer(0.1), 7, gamma=decay)):
        theirs = from_lr_schedule(curve, 16, top, epochs=40, growth=growth)
        for epoch in range(40):
            assert theirs.at(epoch, 0.3).batch_size == ours.at(epoch, 0.3).batch_size
            assert theirs.lr(epoch, 0.3) == pytest.approx(ours.lr(epoch, 0.3), rel=1e-12)

def test_seesaw():
    "Where the scheduler divides the learning rate by a, it is divided by sqrt(a), and the batch multiplied by a."
    schedule = from_lr_schedule(lambda p: 0.1 / 4 ** int(4 * p), 8, 512, epochs=4, rule="sqrt", growth=4)
    for k, stage in enumerate(schedule.stages):
        assert (stage.start, stage.batch_size, stage.lr) == (k, 8 * 4**k, pytest.approx(0.1 / 2**k))
    assert len(schedule.stages) == 4

def test_a_curve_that_rises_again_shrinks_no_batch():
    schedule = from_lr_schedule(lambda p: 0.1 + 0.09 * math.cos(4 * math.pi * p), 8, 256, epochs=10)
    sizes = [schedule.at(e).batch_size for e in range(10)]
    # the peak is 0.19 and the lowest 0.01: four halvings, and in the second half nothing lower
    assert sizes == [8, 8, 32, 128, 128, 128, 128, 128, 128, 128]
    assert schedule.lr(5) / 128 == pytest.approx(0.19 / 8)
    assert isinstance(schedule.curve, Curve)

def test_a_function_of_the_epoch_for_the_batch_size():
    cosine = from_batch_sizes(lambda e: 1024 - 960 * (1 + math.cos(math.pi * e / 30)) / 2, epochs=31, lr=0.1)
    assert [cosine.at(e).batch_size for e in (0, 1, 15, 30)] == [64, 67, 544, 1024]
    steps = from_batch_sizes(lambda e: 64 * 2 ** (e // 10), epochs=30, lr=lambda e: 0.1 * 0.5 ** (e >= 15))
    assert steps.stages == (Stage(0, 64, 0.1), Stage(10, 128, 0.1), Stage(15, 128, 0.05), Stage(20, 256, 0.05))

def test_schedules_and_plans_show_what_they_are():
    expected = "<Schedule of 2 epochs: 16 at lr 0.1 from 0, 32 at lr 0.075 from 1>"
    assert repr(adabatch(16, 32, lr=0.1, every=1, epochs=2)) == expected
    many = fixed(16, lr=0.1, lr_decay=0.9, every=1, epochs=50)
    assert len(repr(many)) < 250 and "44 more" in repr(many) and "from 49" in repr(many)
    plan = Plan(adabatch(16, 32, lr=0.1, every=1, epochs=2), samples=100)
    plan.start = 7
    assert repr(plan) == "<Plan: 7 of 9 updates done, 2 epochs of 100 samples: 6 of 16, 3 of 32>"
