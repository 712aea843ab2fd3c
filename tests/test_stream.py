"""Gradient accumulation over a stream: the updates that a plan counts out, in one process and in two, killed and
resumed; the five lines and the recipes of nbs/your_loop.ipynb as they stand there."""

import multiprocessing, os, random, re, warnings
from functools import partial
from itertools import count, islice

import pytest
import torch
from conftest import together
from test_your_loop import CELLS, execute
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from adabatch import Plan, Schedule, Stage, adabatch, fixed

RAMP = Schedule((Stage(0, 16, 0.1), Stage(0.3, 32, 0.2), Stage(0.6, 64, 0.4)), epochs=1)

class Numbers(IterableDataset):
    "The numbers from 0 on; a worker yields every so many tens."
    def __iter__(self):
        worker = get_worker_info()
        for ten in count(worker.id if worker else 0, worker.num_workers if worker else 1):
            yield from map(float, range(10 * ten, 10 * ten + 10))

def defined(schedule, samples, drop_last, micro_batch, processes):
    "Update, size of the batch and whether it is the last one, for each micro-batch of a process; slow but plain."
    rows, used, update = [], 0, 0
    while used < samples:
        size = [s.batch_size for s in schedule.stages if s.start * samples <= used + 1e-6][-1]
        if used + size > samples and drop_last: break
        size = min(size, samples - used)
        rows += [(update, size, k == 1) for k in range(size // (micro_batch * processes), 0, -1)]
        used, update = used + size, update + 1
    return rows

@pytest.mark.parametrize("drop_last", [True, False])
def test_parts_are_as_defined(drop_last):
    rng = random.Random(0)
    for _ in range(300):
        micro, processes, stages = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 4)
        unit = micro * processes
        starts = [0, *sorted(rng.sample(range(1, 32), stages - 1))]
        schedule = Schedule([Stage(s / 32, unit * rng.randint(1, 8), rng.random() + 0.1) for s in starts], 1)
        samples = unit * rng.randint(8, 80)
        with warnings.catch_warnings(action="ignore"):  # some stages are too short for an update
            plan, again = (Plan(schedule, samples, 0, drop_last, 0, processes, micro) for _ in range(2))
        parts = list(plan.accumulate(count()))
        rows = [(p.update.index, p.update.batch[1] - p.update.batch[0], p.last) for p, _ in parts]
        assert rows == defined(schedule, samples, drop_last, micro, processes)
        assert [batch for _, batch in parts] == list(range(len(parts)))
        assert all(p.update == plan.at(p.update.index) for p, _ in parts)
        for update in range(plan.updates):
            assert sum(p.weight for p, _ in parts if p.update.index == update) == pytest.approx(1, rel=1e-14)
        again.start = rng.randrange(plan.updates)
        done = sum(p.update.index < again.start for p, _ in parts)
        assert list(again.accumulate(count(done))) == parts[done:]

def test_the_five_lines():
    "As they stand in the page: updates, samples and learning rates are the planned ones, gradients are batch means."
    [five] = re.findall(r"```python\n(.*?)```", next(cell for cell in CELLS if cell.startswith("## Streams")), re.S)
    assert len(five.splitlines()) == 5
    weight, used, made = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), [], []
    optimizer = torch.optim.SGD([weight], lr=0.1)
    def model(batch):
        used.extend(batch.tolist())
        return (weight * batch).mean()
    def note(*_):
        made.append((used[:], optimizer.param_groups[0]["lr"], weight.grad.item()))
        used.clear()
    optimizer.register_step_pre_hook(note)
    loader = DataLoader(Numbers(), batch_size=8, num_workers=2, drop_last=True)
    names = dict(Plan=Plan, schedule=RAMP, samples=400, optimizer=optimizer, loader=loader, model=model)
    exec(five, names)
    plan = Plan(RAMP, 400)
    assert names["plan"].start == len(made) == plan.updates
    stream, expected = [], DataLoader(Numbers(), batch_size=8, num_workers=2, drop_last=True)
    for batch in expected:
        stream += batch.tolist()
        if len(stream) >= 400: break
    for update, (samples, lr, gradient) in enumerate(made):
        now = plan.at(update)
        assert samples == stream[slice(*now.batch)] and len(samples) == now.batch_size
        assert lr == pytest.approx(now.lr, rel=1e-14)
        assert gradient == pytest.approx(sum(samples) / len(samples), rel=1e-14)

def train_whole_killed_and_resumed(processes, workers, folder):
    multiprocessing.set_start_method("fork", force=True)  # the classes of the page are in no module
    recipe = "stream" if processes == 1 else "stream_processes"
    names = execute(recipe)
    class Network(names["Network"]):
        "In double precision. Keeps the losses."
        def __init__(self, kill_at=None):
            super().__init__(kill_at)
            self.double().losses = []
        def forward(self, index, x, labels):
            loss = super().forward(index, x.double(), labels)["loss"]
            self.losses.append(loss.item())
            return dict(loss=loss)
    names["Network"], rank = Network, int(os.environ.get("RANK", 0))
    schedule, samples, train = names["ramp"], names["samples"], partial(names[f"train_{recipe}"], workers=workers)
    def run(train, name, kill_at=None):
        return names["train_network"](train, folder / name, names["Stream"](rank, processes), schedule, kill_at)
    plan = names["Streamed"](schedule, samples, rank=rank, world_size=processes, micro_batch=3)
    whole, killed, resumed = run(train, "whole"), run(train, "killed", kill_at=14), run(train, "killed")
    assert [len(b) * processes for b in whole.batches] == [plan.at(k).batch_size for k in range(plan.updates)]
    assert whole.batches == list(plan)
    assert whole.lrs == pytest.approx([plan.lr(k) for k in range(plan.updates)], rel=1e-14)
    done = sum(plan.at(k).micro_batches for k in range(12))
    assert plan.at(12).batch_size == plan.at(14).batch_size == 24  # saved and killed within the ramp
    assert len(resumed.batches) == plan.updates - 12 and len(killed.batches) == 14
    assert killed.losses[:done] + resumed.losses == whole.losses  # to the bit
    alone = run(partial(names["train_reference"], plan=names["Streamed"](schedule, samples)), "alone")
    for a, b, c in zip(whole.parameters(), resumed.parameters(), alone.parameters()):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-13)

@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_within_the_ramp(processes, workers, tmp_path):
    pytest.importorskip("torchdata", reason="torchdata is not installed")
    together(processes, train_whole_killed_and_resumed, processes, workers, tmp_path)

def check_recipe(recipe, package, folder):
    names = execute(recipe)
    names["folder"] = folder  # the same in both processes
    names["check"](package, names[f"train_{recipe}"], names["Streamed"], tolerance=1e-6)

@pytest.mark.parametrize("package", ["accelerate", "transformers", "lightning"])
def test_frameworks_in_two_processes(package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    together(2, check_recipe, f"stream_{package}", package, tmp_path)

@pytest.mark.parametrize("settings, line", [
    (dict(micro_batch=12), "16 samples .* micro-batches of 12 on 1 process: the nearest are 12 and 24"),
    (dict(micro_batch=8, world_size=3), "16 samples .* of 8 on 3 processes: the nearest is 24"),
    (dict(micro_batch=32), "16 samples .* micro-batches of 32 on 1 process: the nearest is 32"),
    (dict(micro_batch=8, drop_last=False, samples=404), "404 samples .*: the nearest are 400 and 408"),
    (dict(micro_batch=0), "micro_batch must be at least 1"),
])
def test_batches_that_cannot_be_divided(settings, line):
    with pytest.raises(ValueError, match=line): Plan(**dict(schedule=RAMP, samples=400) | settings)

def test_batches_that_can_be_divided():
    Plan(fixed(96, 0.1, epochs=1), 400, micro_batch=16, world_size=3)
    Plan(RAMP, 404, micro_batch=8)  # the 4 that are left over are dropped

def test_a_plan_without_micro_batches_accumulates_nothing():
    with pytest.raises(ValueError, match="give Plan micro_batch"): Plan(RAMP, 400).accumulate([])

def test_a_stream_that_ends_early_is_noticed():
    plan = Plan(RAMP, 400, micro_batch=8)
    with pytest.warns(UserWarning, match="the stream has ended after 2 of the 14 planned updates") as caught:
        assert len(list(plan.accumulate(range(5)))) == 5
    assert caught[0].filename == __file__

def test_a_scheduler_stepped_at_every_micro_batch_is_noticed():
    plan, parameter = Plan(RAMP, 400, micro_batch=8), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = plan.lr_scheduler(optimizer)
    with pytest.warns(UserWarning, match="has counted 2 updates, but the plan has given 1 batches"):
        for _part, _ in zip(plan.accumulate(count()), range(4)):
            optimizer.step()
            scheduler.step()

def test_a_finite_stream_again_in_every_epoch():
    plan = Plan(adabatch(16, 64, lr=0.1, every=1, epochs=3), 400, micro_batch=8)
    turns = [[part.update.index for part, _ in plan.accumulate(range(60)) if part.last] for _ in plan.by_epoch()]
    assert turns == [list(plan.updates_of(epoch)) for epoch in range(3)]

def test_a_long_stream_is_planned_at_once():
    schedule = Schedule([Stage(225e9 / 8.1e12 * k / 3, 2304 * (k + 1), 2.4e-4) for k in range(4)], epochs=1)
    plan = Plan(schedule, 10**15, micro_batch=9, world_size=64)
    plan.start = plan.updates - 1
    parts = [part for part, _ in islice(plan.accumulate(count()), 17)]
    assert len(parts) == 16 and parts[0].update.batch_size == 9216 and [part.last for part in parts].index(True) == 15
