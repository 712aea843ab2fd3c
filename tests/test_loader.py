import copy, json, pickle, re
from itertools import zip_longest
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as some
from torch.utils.data import DataLoader, Dataset, get_worker_info

from adabatch.data import draw_epoch
from adabatch.loader import Plan, shard
from adabatch.schedule import Schedule, Stage, adabatch, fixed, from_lr_schedule

AT_5 = Schedule((Stage(0, 8, 0.1), Stage(0.4, 32, 0.2)), epochs=3)  # of 100 samples: from the sixth update on

class Indices(Dataset):
    "Gives back the index it is asked for, and the process that answered."
    def __getitem__(self, index): return index, (get_worker_info().id if get_worker_info() else -1)

def loader(plan, workers=0, **settings):
    return DataLoader(Indices(), batch_sampler=plan, num_workers=workers, persistent_workers=workers > 0, **settings)

def drawn(loader): return [indices.tolist() for indices, _ in loader]

@pytest.mark.parametrize("drop_last", [True, False])
def test_the_plan_is_what_a_trainer_computes_epoch_by_epoch(drop_last):
    growing = adabatch(16, 64, lr=0.1, every=2, epochs=7, warmup_epochs=2, base_batch_size=8)
    for schedule in (growing, fixed(30, 0.1, every=3, epochs=5)):
        plan = Plan(schedule, 100, seed=3, drop_last=drop_last)
        updates = iter(range(len(plan)))
        for epoch in range(schedule.epochs):
            size = schedule.at(epoch).batch_size
            slices = [(a, min(a + size, 100)) for a in range(0, 100 - 100 % size if drop_last else 100, size)]
            order = draw_epoch(100, 3, epoch).order
            for k, batch in enumerate(slices):
                now = plan.at(update := next(updates))
                assert (now.index, now.epoch, now.batch, now.weight) == (update, epoch, batch, 1.0)
                assert now.batch_size == size
                assert now.lr == plan.lr(update) == schedule.lr(epoch, k / len(slices))  # to the bit
                assert plan.indices(update) == order[slice(*batch)].tolist()
        assert next(updates, None) is None

@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_batch_changes_at_the_planned_update(workers):
    plan = Plan(AT_5, 100)
    sizes = [len(x) for x, _ in loader(plan, workers, prefetch_factor=4 if workers else None)]
    assert sizes[:6] == [8] * 5 + [32] and sizes.index(32) == 5
    assert [plan.lr(k) for k in (4, 5)] == [0.1, 0.2]

@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_sample_once_an_epoch_in_the_same_order(processes, workers):
    whole = Plan(AT_5, 100, seed=1, drop_last=False)
    plans = [Plan(AT_5, 100, seed=1, drop_last=False, rank=r, world_size=processes) for r in range(processes)]
    loaders = [loader(plan, workers) for plan in plans]
    pids, used, sizes = [], [], []
    for epochs in zip_longest(*(plan.by_epoch() for plan in plans)):
        batches = [sum(shards, []) for shards in zip(*map(drawn, loaders))]
        assert sorted(sum(batches, [])) == list(range(100))
        assert sum(batches, []) == draw_epoch(100, 1, epochs[0]).order.tolist()
        sizes += map(len, batches)
        used += batches
        pids.append([w.pid for one in loaders if workers for w in one._iterator._workers])
    assert sizes == [8] * 5 + [32, 28] + [32, 32, 32, 4] * 2
    assert used == list(whole)
    assert pids[0] == pids[1] == pids[2] and len(pids[0]) == processes * workers
    assert [len(plan) for plan in plans] == [0] * processes

def test_shards_differ_by_one_and_an_empty_one_counts_nothing():
    plans = [Plan(fixed(4, lr=1.0, epochs=1), 6, drop_last=False, rank=r, world_size=3) for r in range(3)]
    assert [plan.at(0).shard for plan in plans] == [(0, 2), (2, 3), (3, 4)]
    assert [plan.at(1).shard for plan in plans] == [(4, 5), (5, 6), (6, 6)]
    assert [[plan.at(u).weight for plan in plans] for u in (0, 1)] == [[1.5, 0.75, 0.75], [1.5, 1.5, 0.0]]
    order = draw_epoch(6, 0, 0).order.tolist()
    assert [plan.indices(1) for plan in plans] == [order[4:5], order[5:6], order[4:5]]
    assert plans[2].at(1).shard == shard((4, 6), 2, 3)

@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_anywhere_with_other_workers_and_processes(workers):
    schedule = Schedule((Stage(0, 8, 0.1), Stage(0.4, 16, 0.1), Stage(1.3, 32, 0.1)), epochs=3)
    whole = list(Plan(schedule, 100, drop_last=False))
    parts = [Plan(schedule, 100, drop_last=False, rank=r, world_size=2) for r in range(2)]
    for part in parts: part.start = 9
    assert [a + b for a, b in zip(*(drawn(loader(part, workers)) for part in parts))] == whole[9:]

def test_an_interrupted_epoch_is_finished_before_the_next():
    plan = Plan(AT_5, 100, drop_last=False)
    plan.start = 6
    turns = [(epoch, len(list(plan))) for epoch in plan.by_epoch()]
    assert turns == [(0, 1), (1, 4), (2, 4)]
    plan.start = 0
    for _ in plan.by_epoch(): break
    assert len(plan) == plan.updates == 15  # outside of the loop over epochs, the whole training again

def groups(*lrs):
    return torch.optim.SGD([dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in lrs], lr=lrs[0])

@pytest.mark.parametrize("schedule", [
    AT_5, adabatch(8, 32, lr=0.1, every=1, epochs=3),
    adabatch(16, 32, lr=0.1, every=2, epochs=4, warmup_epochs=2, base_batch_size=4),
    from_lr_schedule(lambda p: min(p / 0.3, 1) * 0.1 * 0.2**p, 8, 32, epochs=3),  # rises from 0
])
@pytest.mark.parametrize("order", ["load first", "schedule first"])
def test_learning_rates_of_several_groups_and_after_a_resume(schedule, order):
    plan = Plan(schedule, 100)
    expected = [[plan.lr(k) * scale for scale in (1, 0.1, 3)] for k in range(len(plan))]
    base = schedule.base_lr
    optimizer = groups(base, base / 10, base * 3)
    scheduler, seen = plan.lr_scheduler(optimizer), []
    for step in range(len(plan)):
        seen.append([group["lr"] for group in optimizer.param_groups])
        if step == 7: saved = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        scheduler.step()
    assert seen == [pytest.approx(lrs, rel=1e-14, abs=1e-16) for lrs in expected]
    resumed = groups(base, base / 10, base * 3)
    plan.start = 7
    if order == "load first": resumed.load_state_dict(saved)
    scheduler = plan.lr_scheduler(resumed)
    if order == "schedule first": resumed.load_state_dict(saved)
    again = []
    for _ in range(7, plan.updates):
        again.append([group["lr"] for group in resumed.param_groups])
        resumed.step()
        scheduler.step()
    assert again == seen[7:]

def test_the_loop_in_the_readme_is_the_one_that_the_notebook_proves():
    "nbs/01_loader.ipynb runs it with a warm-up, several parameter groups and an interruption."
    (readme,) = (b for b in re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S) if "Plan(" in b)
    cells = json.loads(Path("nbs/01_loader.ipynb").read_text())["cells"]
    (proven,) = (s for s in ("".join(cell["source"]) for cell in cells) if "def train(resume, save" in s)
    def plain(code):
        for pattern, text in ((r"#.*", ""), (r"adabatch\(.*?\)", "schedule"), (r"num_workers=\w+", ""), (r"% \d+", "")):
            code = re.sub(pattern, text, code)
        return [line.strip() for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert plain(readme) == plain(proven.partition("def train(")[2])[1:]

@pytest.mark.parametrize("make, error, line", [
    (lambda: Plan("adabatch", 100), TypeError, "schedule must be a Schedule, not a str"),
    (lambda: Plan(AT_5, Indices()), TypeError, "samples must be an integer"),
    (lambda: Plan(AT_5, 0), ValueError, "samples must be at least 1"),
    (lambda: Plan(AT_5, 31), ValueError, "batch size 32 is larger than the training set of 31 samples"),
    (lambda: Plan(AT_5, 100, seed=-1), ValueError, "seed must be at least 0"),
    (lambda: Plan(AT_5, 100, seed=2**64), ValueError, "seed must be at most"),
    (lambda: Plan(AT_5, 100, rank=2, world_size=2), ValueError, "rank must be at most 1, not 2"),
    (lambda: Plan(AT_5, 100, world_size=0), ValueError, "world_size must be at least 1"),
    (lambda: Plan(AT_5, 100).at(-1), ValueError, "update must be at least 0"),
    (lambda: Plan(AT_5, 100).at(2.5), TypeError, "update must be an integer"),
    (lambda: Plan(AT_5, 100).lr(10**9), ValueError, "update must be at most 11"),
    (lambda: setattr(Plan(AT_5, 100), "start", 13), ValueError, "start must be at most 12, not 13"),
    (lambda: setattr(Plan(AT_5, 100), "start", None), TypeError, "start must be an integer, not None"),
])
def test_bad_numbers(make, error, line):
    with pytest.raises(error, match=line): make()

def test_a_long_training_is_planned_at_once():
    schedule = adabatch(16, 64, lr=0.1, milestones=[10**6, 10**9], epochs=10**12)
    from_lr_schedule(lambda progress: 1.1 - progress, 16, 64, epochs=10**12)
    plan = Plan(schedule, 50_000)
    assert [(s.epoch, s.epochs) for s in plan.segments] == [(0, 10**6), (10**6, 10**9 - 10**6), (10**9, 10**12 - 10**9)]
    assert len(plan) == 3125 * 10**6 + 1562 * (10**9 - 10**6) + 781 * (10**12 - 10**9)
    plan.start = len(plan) - 2
    assert [len(batch) for batch in plan] == [64, 64]
    assert len(pickle.dumps(plan)) < 10**6 and plan.at(plan.updates - 1).epoch == 10**12 - 1

@pytest.mark.filterwarnings("ignore:no update is left")
@pytest.mark.filterwarnings("ignore:all .* updates are done")
def test_properties_of_any_plan():
    @some.composite
    def plans(draw):
        samples, starts = draw(some.integers(1, 60)), some.integers(1, 60).map(lambda k: k / 16)
        starts = [0, *sorted(draw(some.sets(starts, max_size=4)))]
        stages = [Stage(start, draw(some.integers(1, samples)), draw(some.floats(1e-3, 1))) for start in starts]
        world = draw(some.integers(1, 4))
        epochs, warmup = draw(some.integers(1, 4)), draw(some.integers(0, 2))
        schedule = Schedule(stages, epochs, warmup)
        settings = dict(seed=draw(some.integers(0, 2**64 - 1)), drop_last=draw(some.booleans()), world_size=world)
        return [Plan(schedule, samples, rank=rank, **settings) for rank in range(world)]
    @hypothesis.given(plans(), some.data())
    @hypothesis.settings(deadline=None, max_examples=150, derandomize=True)
    def check(plans, data):
        one, schedule, used = plans[0], plans[0].schedule, 0
        epochs, last = [], 0
        for update in range(len(one)):
            views = [plan.at(update) for plan in plans]
            now = views[0]
            assert len({(v.epoch, v.batch, v.lr, v.batch_size) for v in views}) == 1
            assert now.batch[0] == views[0].shard[0] and views[-1].shard[1] == now.batch[1]
            assert all(a.shard[1] == b.shard[0] for a, b in zip(views, views[1:]))
            assert sum(v.weight for v in views) == pytest.approx(len(plans))
            done = now.epoch + now.batch[0] / one.samples
            assert now.batch_size == [s.batch_size for s in schedule.stages if s.start <= done + 1e-9][-1]
            assert 0 < now.batch[1] - now.batch[0] <= now.batch_size and 0 <= now.lr <= 1
            assert now.batch[0] == (last if epochs and epochs[-1] == now.epoch else 0)
            epochs.append(now.epoch)
            last, used = now.batch[1], used + now.batch[1] - now.batch[0]
        assert epochs == sorted(epochs) and set(epochs) == set(range(schedule.epochs))
        if not one.drop_last: assert used == one.samples * schedule.epochs
        for epoch in range(schedule.epochs): assert len(one.updates_of(epoch)) == epochs.count(epoch)
        done = data.draw(some.integers(0, len(one)))
        whole = list(one)
        one.start = done
        assert list(one) == whole[done:] and len(one) == len(whole) - done
        assert [one.at(done).epoch] == [next(one.by_epoch())] if done < len(whole) else list(one.by_epoch()) == []
    check()
