"""The noise scale, where it is known; training with the instrument on; growth that is decided while training."""

import io, json, math, signal
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import at_update, small, together
from torch.utils.data import DataLoader, TensorDataset

from adabatch import Plan, Trainer, fixed, record, train
from adabatch.data import load_data
from adabatch.device import Interrupted, process_group
from adabatch.experiment import Experiment, resolve
from adabatch.forecast import seconds_to_match
from adabatch.loader import micro_batches, shard
from adabatch.noise import Halves, NoiseScale, estimate, grow_by, norm
from adabatch.trainer import cross_entropy

# --- the instrument

D, NOISE = 40, 2.0
TRUTH = D + 1 + D * NOISE**2  # of linear regression at a distance of 1 from its solution

def regression(generator, samples):
    return torch.randn(samples, D, generator=generator), NOISE * torch.randn(samples, generator=generator)

def linear():
    model = torch.nn.Linear(D, 1, bias=False)
    torch.nn.init.constant_(model.weight, D**-0.5)
    return model

def half_squared_error(model, x, y): return 0.5 * F.mse_loss(model(x).squeeze(1), y)

def watched(folder):
    "Two processes whose shards are the pieces; the gradients that they end with are those of an unwatched exchange."
    with process_group("cpu"):
        rank = torch.distributed.get_rank()
        plain, model = (torch.nn.parallel.DistributedDataParallel(linear()) for _ in range(2))
        scale, generator = NoiseScale(model, window=100), torch.Generator().manual_seed(rank)
        scale.watch(model)
        for _ in range(100):
            half_squared_error(model, *regression(generator, 32)).backward()  # an update that is not measured
            model.zero_grad()
            x, y = regression(generator, 32)
            for net in (plain, model): half_squared_error(net, x, y).backward()
            scale.exchanged(32)
            assert torch.equal(plain.module.weight.grad, model.module.weight.grad)
            for net in (plain, model): net.zero_grad()
        half_squared_error(model, *regression(generator, 32)).backward()
        with pytest.raises(ValueError, match="the shards of an update differ in size"): scale.exchanged(32 + rank)
        halves = NoiseScale(linear(), window=100)
        for _ in range(100): halves.measure(partial(half_squared_error, halves.model), *regression(generator, 32))
        for found in scale.estimate(), halves.estimate(): assert found.low < TRUTH < found.high
        Path(folder, f"{rank}").write_text(f"{scale.state_dict()} {halves.state_dict()}")

def test_shards_of_two_processes_give_the_known_scale(tmp_path):
    together(2, watched, str(tmp_path))
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()

def moments_of(processes, micro_batch, rank=0):
    "Of the first 101 training digits."
    digits, model = load_data("digits"), small(torch.double)
    part = shard((0, 101), rank, processes)
    halves = Halves(model, lambda x, y: cross_entropy(model(x.double()), y), part[0])
    for batch in digits.train_batches(digits.draw(0, 0), micro_batches(part, micro_batch)): halves.add(*batch)
    return halves.moments(processes).tolist()

def divided(folder):
    with process_group("cpu"):
        rank = torch.distributed.get_rank()
        Path(folder, f"{rank}").write_text(json.dumps([moments_of(3, micro, rank) for micro in (101, 7)]))

def test_halves_do_not_depend_on_how_a_batch_is_divided(tmp_path):
    whole = moments_of(1, 101)
    together(3, divided, str(tmp_path))
    found = [moments for rank in range(3) for moments in json.loads((tmp_path / f"{rank}").read_text())]
    for moments in [moments_of(1, 7), *found]: np.testing.assert_allclose(moments, whole, rtol=1e-9)

def test_pieces_of_accumulation_are_those_that_were_accumulated():
    generator, model = torch.Generator().manual_seed(0), linear()
    scale, pieces = NoiseScale(model), [regression(generator, 8) for _ in range(4)]
    for k, piece in enumerate(pieces):
        (half_squared_error(model, *piece) / 4).backward()
        scale.accumulated(1 / 4, 8, last=k == 3)
    gradients = [torch.autograd.grad(half_squared_error(model, *piece), model.parameters())[0] for piece in pieces]
    mean, squares = sum(gradients) / 4, sum(g.square().sum() for g in gradients) / 4
    expected = (squares - mean.square().sum()) / (1 / 8 - 1 / 32), (32 * mean.square().sum() - 8 * squares) / 24
    np.testing.assert_allclose(scale.measured[0].tolist(), [e.item() for e in expected], rtol=1e-4)

@pytest.mark.parametrize("measured, reason", [
    ([(1.0, 1.0)] * 19, "19 of at least 20 updates"), ([(1.0, -1.0), (1.0, 1.0)] * 20, "no signal above the noise"),
    ([(math.nan, 1.0)] * 40, "infinite gradients"), ([(-1.0, 1.0)] * 40, "no signal above the noise")])
def test_without_signal_or_updates_it_is_undetermined(measured, reason):
    assert str(estimate(measured)) == f"undetermined, {reason}"

def test_its_state_goes_into_a_checkpoint_and_comes_back(tmp_path):
    scale, again, generator = NoiseScale(model := linear()), NoiseScale(model), torch.Generator().manual_seed(0)
    for _ in range(25): scale.measure(partial(half_squared_error, model), *regression(generator, 64))
    torch.save(dict(noise=scale.state_dict(), rows=[asdict(scale.estimate())]), tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint")  # weights_only: no types but Python's and tensors
    again.load_state_dict(saved["noise"])
    assert asdict(again.estimate()) == saved["rows"][0] and again.estimate().value > 0

def accumulate(parts):
    scale, model = NoiseScale(model := linear()), model
    for k, (weight, samples) in enumerate(parts, 1):
        (half_squared_error(model, *regression(torch.Generator().manual_seed(k), samples)) / 4).backward()
        scale.accumulated(weight, samples, last=k == len(parts))

@pytest.mark.parametrize("misuse, message", [
    (lambda: accumulate([(1 / 3, 8)] * 4), "the weights of an update sum to 1.33333, not to 1"),
    (lambda: accumulate([(0, 8)] * 4), "the weights of an update sum to 0, not to 1"),
    (lambda: accumulate([(1 / 4, 8)] * 3 + [(1 / 4, 2)]), r"must be equal, not \(8, 8, 8, 2\)"),
    (lambda: NoiseScale(linear()).accumulated(1, 8, last=True), "there are no gradients"),
    (lambda: NoiseScale(linear()).measure(len, "x", "y"), "a batch is given as its tensors, not as 'x'"),
    (lambda: NoiseScale(linear(), window=10), "window must be at least 20, not 10"),
    (lambda: seconds_to_match(None, math.nan, 1), "noise_scale must be"),
])
def test_what_would_measure_something_else_is_refused(misuse, message):
    with pytest.raises((TypeError, ValueError), match=message): misuse()

def test_accumulation_in_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="use watch and exchanged, or measure"): accumulate([(1 / 4, 8)] * 4)

NETWORKS = {
    "plain": small,
    "batch normalisation": lambda: torch.nn.Sequential(torch.nn.BatchNorm2d(3), *small()),
    "dropout": lambda: torch.nn.Sequential(torch.nn.Dropout(0.2), *small()),
}

def clockless(history):
    return [{n: v for n, v in row.items() if "seconds" not in n and "noise" not in n} for row in history]

@pytest.mark.parametrize("network", NETWORKS)
def test_measuring_changes_no_bit_of_the_training(network):
    def trained(every):
        model = NETWORKS[network]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = fixed(64, lr=0.05, epochs=2)
        trainer = Trainer(model, optimizer, load_data("digits"), schedule, micro_batch=40, noise_every=every)
        return trainer.fit(), [*model.parameters(), *model.buffers()]
    (plain, weights), (measured, same) = trained(None), trained(1)
    assert clockless(plain) == clockless(measured) and all(map(torch.equal, weights, same))
    assert measured[-1]["noise_low"] < measured[-1]["noise_scale"] < measured[-1]["noise_high"]

# --- growth that is decided while training

SETTINGS = dict(device="cpu", save_weights=False, epochs=6, every=1, lr=0.005)

@pytest.mark.parametrize("trigger", ["plateau", "noise", "norm"])
def test_a_triggered_run_resumes_to_the_bit_and_can_be_made_again_as_a_calendar(trigger, quick, tmp_path):
    e = partial(Experiment, **SETTINGS, batch_size=8, max_batch_size=64, trigger=trigger)
    whole = train.run(e(output_dir=str(tmp_path / "whole")))
    grown = (np.flatnonzero(np.diff(whole.batch_size)) + 1).tolist()
    assert grown, whole.batch_size
    run = resolve(e(output_dir=str(tmp_path / "cut")))
    for moment in ((grown[0] - 1, 175), (grown[-1], 1)):  # late in an epoch, before it grew; and after
        stop = at_update(moment, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted): train.run(run, stop())
    assert record.differences(whole, train.run(run)) == []
    again = train.run(e(trigger=",".join(map(str, grown)), output_dir=str(tmp_path)))
    assert {n for n in record.differences(whole, again) if not n.startswith("noise")} == set()
    planned = resolve(Experiment(**SETTINGS, schedule="fixed", batch_size=8)).schedule
    np.testing.assert_allclose(whole.lr / whole.batch_size, [planned.lr(k) / 8 for k in range(6)])

def decided(folder, name):
    with process_group("cpu"):
        model = small(torch.double)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = Trainer(model, optimizer, load_data("digits"), fixed(8, lr=0.005, epochs=3), micro_batch=3,
                          noise_every=1, grow=partial(grow_by, norm, max_batch_size=64))
        rows = [{n: row[n] for n in ("batch_size", "noise_scale", "train_loss")} for row in trainer.fit()]
        if trainer.world.rank == 0: Path(folder, name).write_text(json.dumps(rows))

def test_one_process_and_two_decide_alike(tmp_path):
    for size in (1, 2): together(size, decided, str(tmp_path), str(size))
    one, two = (json.loads((tmp_path / str(size)).read_text()) for size in (1, 2))
    assert len({row["batch_size"] for row in one}) > 1
    for a, b in zip(one, two, strict=True): np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-8)

def rows_of(*rows): return [dict(batch_size=b, updates=u, noise_scale=n, noise_low=n / 2) for b, u, n in rows]

@pytest.mark.parametrize("rows, sizes", [
    ([(16, 80, 100), (16, 80, 100)], [16, 32, 64, 64]),  # after every epoch
    ([(16, 80, math.nan), (16, 80, math.nan)], [16, 16, 16, 16]),  # undetermined
    ([(16, 19, 100), (16, 19, 100)], [16, 16, 32, 32]),  # too few updates in an epoch
    ([(16, 80, 900), (32, 80, 900), (64, 80, 900)], [16, 32, 64, 64]),  # to its largest
    ([(16, 80, 10)], [16, 16, 16, 16]),
])
def test_it_grows_as_the_rows_say_to_its_largest_after_a_while(rows, sizes):
    schedule = grow_by(norm, fixed(16, lr=0.1, every=2, epochs=4), rows_of(*rows), max_batch_size=64)
    assert [schedule.at(epoch).batch_size for epoch in range(4)] == sizes

@pytest.mark.parametrize("settings, message", [
    (dict(trigger="sometimes"), "trigger must be one of plateau, noise, norm, or epochs"),
    (dict(trigger="noise", schedule="fixed"), "a fixed schedule has no trigger"),
    (dict(trigger="2,4", max_batch_size=32), "the batch grows to 64, above max_batch_size (32)"),
    (dict(trigger="12"), "epoch must be at most 9, not 12"),
    (dict(noise_every=0), "noise_every must be at least 1, not 0"),
])
def test_what_cannot_be_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        resolve(Experiment(device="cpu", **settings))

@pytest.mark.parametrize("workers", [0, 2])
def test_a_plan_that_has_grown_resumes_with_the_same_samples_and_rates(workers):
    data = TensorDataset(torch.arange(100))

    def loop(grow_after, state=None, stop=None):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        plan, seen = Plan(fixed(8, lr=0.1, every=2, epochs=5), len(data)), []
        if state: plan.load_state_dict(state)
        loader, scheduler = DataLoader(data, batch_sampler=plan, num_workers=workers), plan.lr_scheduler(optimizer)
        for epoch in plan.by_epoch():
            for [x] in loader:
                if len(seen) == stop: return seen, plan.state_dict()
                seen.append((x.tolist(), optimizer.param_groups[0]["lr"]))
                optimizer.step()
                scheduler.step()
            if epoch in grow_after: plan.grow()
        return seen, plan.state_dict()
    whole, state = loop({0, 2})
    assert [len(batch) for batch, _ in whole] == [8] * 12 + [16] * 12 + [32] * 6
    assert state == dict(update=30, samples=100, seed=0, place="epoch 5, sample 0", grown=[[1, 2], [3, 2]])
    planned = fixed(8, lr=0.1, every=2, epochs=5)
    epochs = [0] * 12 + [1] * 6 + [2] * 6 + [3] * 3 + [4] * 3
    np.testing.assert_allclose([lr / len(b) for b, lr in whole], [planned.lr(epoch) / 8 for epoch in epochs])
    first, state = loop({0, 2}, stop=20)
    assert first + loop({2}, state)[0] == whole

@pytest.mark.filterwarnings("ignore:Detected call of")
def test_the_schedulers_state_says_how_a_plan_has_grown():
    def made():
        plan = Plan(fixed(8, lr=0.1, epochs=3), 100)
        return plan, plan.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    plan, scheduler = made()
    for _ in plan.by_epoch():
        for _ in plan: scheduler.step()
        if "grown" in plan.state_dict(): break
        plan.grow(np.float64(2))  # a factor that torch.load would refuse
    again, resumed = made()
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    again.start = resumed.last_epoch
    assert again.state_dict() == plan.state_dict() and (plan.start, plan._grown) == (18, [[1, 2]])
    assert resumed.get_last_lr() == [0.2] and list(again)[0] == list(plan)[0]

def in_epoch(plan, epoch, *growth):
    for now in plan.by_epoch():
        if now != epoch: continue
        for factor in growth: plan.grow(factor)

def after(plan, update, growth=2):
    plan.start = update
    plan.grow(growth)

@pytest.mark.parametrize("misuse, message", [
    (lambda plan: after(plan, 3), "a plan grows between epochs"),
    (lambda plan: after(plan, 0), "a plan grows after its first epoch"),
    (lambda plan: after(plan, 24), "a plan cannot grow in its last epoch, or after it"),
    (lambda plan: after(plan, 12, 32), "batch size 256 is larger than the training set"),
    (lambda plan: after(plan, 12, 0.5), "growth must be more than 1, not 0.5"),
    (lambda plan: after(plan, 12, 1.1), "9 samples are no whole number of micro-batches of 2"),
    (lambda plan: in_epoch(plan, 1, 2), "a plan cannot grow in its last epoch"),
    (lambda plan: in_epoch(plan, 0, 2, 2), "the plan already grows for epoch 1"),
])
def test_a_plan_grows_once_between_epochs_as_far_as_it_can(misuse, message):
    plan = Plan(fixed(8, lr=0.1, epochs=2), 100, micro_batch=2)
    with pytest.raises(ValueError, match=message): misuse(plan)
    assert plan.schedule.stages[-1].batch_size == 8 * 2 ** len(plan._grown) and len(plan._grown) < 2

@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_plan_does_not_grow_under_a_loop_over_all_of_it():
    plan = Plan(fixed(8, lr=0.1, epochs=2), 100)
    scheduler = plan.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    for _ in plan:
        scheduler.step()
        if plan.start == 12: break
    with pytest.raises(ValueError, match="a plan grows between epochs"): plan.grow()
    plan.start = 12  # as when it is resumed
    plan.grow()
    assert len(plan) == 6
