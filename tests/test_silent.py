"Uses that would train something other than what is planned: each is mended, refused or warned of in one line."

import contextlib, copy, errno, functools, io, itertools, os, warnings, zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small, together
from torch.optim.lr_scheduler import (CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR, OneCycleLR,
                                      SequentialLR)
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from adabatch import files, record, train
from adabatch.data import load_data
from adabatch.device import process_group
from adabatch.experiment import Experiment, resolve
from adabatch.loader import Plan
from adabatch.schedule import Schedule, Stage, adabatch, fixed, from_lr_schedule
from adabatch.trainer import Trainer

SCHEDULE = adabatch(8, 32, lr=0.1, every=1, epochs=3)  # of 100 samples: 12 + 6 + 3 updates

def sgd(lr=0.1, model=None): return torch.optim.SGD((model or torch.nn.Linear(4, 2)).parameters(), lr=lr, momentum=0.9)

def parts(workers=0, **settings):
    "A plan, its loader, an optimizer and its scheduler."
    plan, optimizer = Plan(SCHEDULE, 100, **settings), sgd()
    dataset = TensorDataset(torch.arange(100))
    return plan, DataLoader(dataset, batch_sampler=plan, num_workers=workers), optimizer, plan.lr_scheduler(optimizer)

def step(optimizer, scheduler):
    optimizer.step()
    scheduler.step()

def listen(action):
    "Do this with every warning but those of other packages that are of no interest here."
    warnings.simplefilter(action, UserWarning)
    for message in ("This DataLoader will create", "'set_vital' is deprecated"):
        warnings.filterwarnings("ignore", message, UserWarning)

def warned(call, line, here=True):
    "What `call()` returns; it warns once, in one line, which is shown as a warning of the line that called."
    with warnings.catch_warnings(record=True) as caught:
        listen("always")
        result = call()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and line in messages[0] and "\n" not in messages[0] and len(messages[0]) < 250, messages
    assert caught[0].category is UserWarning and (caught[0].filename == __file__ or not here), caught[0].filename
    return result

@pytest.fixture(autouse=True)
def strict():
    "Whatever is used as it should be is silent."
    with warnings.catch_warnings():
        listen("error")
        yield

# 1. a model that arrives in eval mode

def dropping():
    "With batch normalisation and dropout, whose modes the results depend on."
    torch.manual_seed(0)
    layers = torch.nn.Linear(3072, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 10)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)

def trainer(model=None, epochs=2, **settings):
    model = model or small()
    return Trainer(model, sgd(1.0, model), load_data("digits"), fixed(64, lr=0.1, epochs=epochs), **settings)

def final(prepare, **settings):
    "The state after a training of the network, once it was prepared."
    model = dropping()
    prepare(model)
    trainer(model).fit(**settings)
    return model.state_dict()

def same(a, b): return all(torch.equal(a[name], b[name]) for name in a)

def test_a_model_in_eval_mode_is_trained_in_train_mode():
    expected = final(lambda model: None)
    assert same(final(torch.nn.Module.eval), expected)
    model = dropping()
    t = trainer(model)
    model.eval()  # after the trainer was made
    t.fit(on_epoch=lambda epoch, row: model.eval())  # and by a test of one's own
    assert same(model.state_dict(), expected)

def test_layers_that_are_frozen_stay_so():
    model = dropping()
    model[2].eval()  # batch normalisation keeps its statistics
    trainer(model).fit()
    assert model[2].num_batches_tracked == 0 and not model[2].training and model.training

def evaluated(folder):
    with process_group("cpu"):
        model = small().eval()
        model[0].eval()
        trainer(model)
        assert not model.training

def test_two_processes_leave_the_mode_as_it_is(tmp_path): together(2, evaluated, tmp_path)

# 2. a loss that is a mean

def penalised(output, y): return F.cross_entropy(output, y) + 0.1 * output.square().mean()

@pytest.mark.parametrize("loss", [F.cross_entropy, penalised])
def test_a_mean_loss_is_refused(loss):
    with pytest.raises(ValueError, match="must be summed over the samples"): trainer(loss=loss).fit()

def test_a_mean_metric_is_refused():
    first = load_data("digits").test[1][0]  # of a single sample, many metrics are 0, which is twice itself
    for metric in (lambda output, y: (output.argmax(1) != y).float().mean() + 1,
                   lambda output, y: (y != first).float().mean()):
        with pytest.raises(ValueError, match="the metric must be summed over the samples"): trainer(metric=metric).fit()

def test_gradients_of_before_are_not_trained_with():
    stale = small(), small()
    for model in stale: model.load_state_dict(stale[0].state_dict())
    stale[0](torch.ones(2, 3, 32, 32)).sum().backward()
    for model in stale: trainer(model, epochs=1).fit()
    assert same(stale[0].state_dict(), stale[1].state_dict())

def test_a_summed_loss_is_asked_without_a_trace():
    asked, expected = dropping(), dropping()
    trainer(asked, loss=functools.partial(F.cross_entropy, reduction="sum")).fit()
    trainer(expected).fit()  # the default is known to be a sum: it is not asked
    assert same(asked.state_dict(), expected.state_dict())

UNUSABLE = {
    "a number": lambda output, y: F.cross_entropy(output, y, reduction="sum").item(),
    "a vector": lambda output, y: F.cross_entropy(output, y, reduction="none"),
    "detached": lambda output, y: F.cross_entropy(output, y, reduction="sum").detach(),
    "nothing": lambda output, y: None,
}

@pytest.mark.parametrize("loss", UNUSABLE.values(), ids=UNUSABLE)
def test_a_loss_that_cannot_be_differentiated(loss):
    with pytest.raises(TypeError, match="the loss must be") as caught: trainer(loss=loss).fit()
    assert "\n" not in str(caught.value)

# 3. a loop over epochs left around the loop over all updates; a scheduler that is stepped too often

@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_over_epochs_around_the_loader(workers):
    plan, loader, optimizer, scheduler = parts(workers)
    def train():
        made = 0
        for _ in range(3):
            for _ in loader:
                step(optimizer, scheduler)
                made += 1
        return made
    assert warned(train, "all 21 updates are done", here=False) == 21

MISUSES = []

def misuse(line, here=True): return lambda loop: MISUSES.append(pytest.param(loop, line, here, id=loop.__name__))

@misuse("has counted 22 updates, but the plan has given 0 batches of 21")
def stepped_beyond_the_plan(plan, loader, optimizer, scheduler):
    for _ in range(25): step(optimizer, scheduler)

@misuse("step it once after each batch")
def stepped_twice_a_batch(plan, loader, optimizer, scheduler):
    for _ in loader:
        step(optimizer, scheduler)
        scheduler.step()

@misuse("step it once after each batch")
def an_epoch_trained_twice(plan, loader, optimizer, scheduler):
    for _ in plan.by_epoch():
        for _ in range(2):
            for _ in loader: step(optimizer, scheduler)

@misuse("step it once after each batch")
def stepped_every_other_batch(plan, loader, optimizer, scheduler):
    for _ in plan.by_epoch():
        for k, _ in enumerate(loader):
            if k % 2: step(optimizer, scheduler)

@misuse("the epoch gave 12 batches, but the scheduler has counted 0: step it once")
def stepped_never(plan, loader, optimizer, scheduler):
    for _ in plan.by_epoch(): list(loader)

@misuse("has given all 21 batches, but the scheduler has counted 1 updates", here=False)
def stepped_every_epoch(plan, loader, optimizer, scheduler):
    for _ in range(3):
        for _ in loader: optimizer.step()
        scheduler.step()

@misuse("nothing else may set it, no other scheduler either")
def two_schedulers(plan, loader, optimizer, scheduler):
    other = CosineAnnealingLR(optimizer, 21)
    for _ in loader:
        step(optimizer, scheduler)
        other.step()

@misuse("another scheduler, such as SequentialLR, sets the number of updates", here=False)
def inside_a_sequence(plan, loader, optimizer, scheduler):
    both = SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=5), scheduler], milestones=[5])
    for _ in loader: step(optimizer, both)

@misuse("4 passes have begun after 0 updates", here=False)
def passes_cut_short_and_not_counted(plan, loader, optimizer, scheduler):
    for _ in range(4): list(itertools.islice(loader, 4))

@misuse("one scheduler of the plan has counted 1 updates, another 5: step all of them")
def two_optimizers_at_different_rates(plan, loader, optimizer, scheduler):
    other = sgd()
    rarely = plan.lr_scheduler(other)
    for k, _ in enumerate(loader):
        step(optimizer, scheduler)
        if k % 5 == 4: step(other, rarely)
    assert plan.start == 21

@pytest.mark.parametrize("loop, line, here", MISUSES)
def test_a_scheduler_that_is_not_stepped_once_a_batch(loop, line, here): warned(lambda: loop(*parts()), line, here)

def test_gradients_accumulated_over_batches_of_the_plan():
    plan, optimizer = Plan(fixed(1, lr=0.1, epochs=30), 100), sgd()
    scheduler = plan.lr_scheduler(optimizer)
    def train():
        for k, _ in enumerate(plan):
            if k % 2: step(optimizer, scheduler)
    warned(train, "batches were drawn since the scheduler last counted an update", here=False)

# 4. and 10. what to save, and one meaning of a step

@pytest.mark.parametrize("by_epoch", [False, True])
@pytest.mark.parametrize("workers", [0, 3])
def test_start_is_the_number_of_updates_done(workers, by_epoch):
    plan, loader, optimizer, scheduler = parts(workers)
    done = 0
    for _ in plan.by_epoch() if by_epoch else [0]:
        for (indices,) in loader:
            assert plan.start == done and indices.tolist() == plan.indices(plan.start)  # the update under way
            assert optimizer.param_groups[0]["lr"] == plan.at(plan.start).lr
            step(optimizer, scheduler)
            done += 1
            assert plan.start == plan.state_dict()["update"] == scheduler.last_epoch == done
            assert len(plan) in (21, 12, 6, 3)  # it does not shrink in a loop
    assert done == 21 and list(plan.by_epoch()) == []

@pytest.mark.parametrize("saved", ["plan.start", "plan.state_dict()", "scheduler.state_dict()"])
@pytest.mark.parametrize("at", [1, 12, 15])
def test_whatever_is_saved_resumes(saved, at):
    expected = list(Plan(SCHEDULE, 100))
    plan, loader, optimizer, scheduler = parts(workers=2)
    for _ in loader:
        step(optimizer, scheduler)
        if plan.start == at: break
    state = eval(saved)
    assert "plan" not in str(state)
    weights = copy.deepcopy(optimizer.state_dict())
    plan, loader, optimizer, scheduler = parts(workers=2)
    optimizer.load_state_dict(weights)
    if saved == "scheduler.state_dict()":
        scheduler.load_state_dict(state)
        plan.start = scheduler.last_epoch
    else:
        plan.load_state_dict(state if isinstance(state, dict) else {"update": state})
        scheduler = plan.lr_scheduler(optimizer)
    for (indices,) in loader:
        assert optimizer.param_groups[0]["lr"] == plan.lr(plan.start) and indices.tolist() == expected[plan.start]
        step(optimizer, scheduler)
    assert plan.start == 21

def test_a_loop_that_breaks_off_goes_on():
    plan, loader, optimizer, scheduler = parts()
    seen = []
    for stop in (5, 13, 21):
        for (indices,) in loader:
            seen.append(indices.tolist())
            step(optimizer, scheduler)
            if plan.start == stop: break
    assert seen == list(Plan(SCHEDULE, 100))

def test_looking_at_batches_counts_nothing():
    plan, loader, optimizer, scheduler = parts()
    assert [len(batch) for batch in plan] == [8] * 12 + [16] * 6 + [32] * 3 and plan.start == 0
    next(iter(loader))
    for _ in loader:
        step(optimizer, scheduler)
        if plan.start == 5: next(iter(loader))
    assert plan.start == 21

@pytest.mark.parametrize("workers", [0, 2])
def test_looking_twice_at_a_batch_counts_nothing(workers):
    plan, loader, optimizer, scheduler = parts(workers)
    for stop in (5, 10, 21):
        for _ in range(2): next(iter(loader))
        for _ in loader:
            step(optimizer, scheduler)
            if plan.start == stop: break

def test_a_loop_over_epochs_that_only_looks():
    plan, loader, optimizer, scheduler = parts()
    def look(): assert list(plan.by_epoch()) == list(range(plan.at(plan.start).epoch, 3))
    assert [(epoch, len(plan)) for epoch in plan.by_epoch()] == [(0, 12), (1, 6), (2, 3)] and len(loader) == 21
    for epoch in plan.by_epoch():
        if epoch: break
    assert plan.start == 0
    for _ in loader:
        step(optimizer, scheduler)
        if plan.start == 5: break
    look()
    made = []
    for epoch in plan.by_epoch():
        look()
        for _ in loader: step(optimizer, scheduler)
        made.append(plan.start)
        if epoch: break
    look()
    for _ in plan.by_epoch():
        for _ in loader: step(optimizer, scheduler)
        made.append(plan.start)
    assert made == [12, 18, 21] and plan.start == 21

def test_a_state_of_another_plan():
    plan = Plan(fixed(8, 0.1, epochs=4), 100)
    plan.start = 15
    state = plan.state_dict()
    for other, name in ((Plan(fixed(32, 0.1, epochs=8), 100), "place"),
                        (Plan(fixed(8, 0.1, epochs=4), 99, seed=7), "samples, seed")):
        with pytest.raises(ValueError, match=rf"the state is of another plan \({name}\)"): other.load_state_dict(state)
        assert other.start == 0
    longer = Plan(fixed(8, 0.1, epochs=6), 100, rank=1, world_size=2)
    longer.load_state_dict(state)
    assert longer.start == 15
    with pytest.raises(ValueError): plan.load_state_dict({"update": 999, "grown": [[2, 2]]})
    assert (plan.start, plan.updates) == (15, 48)

def test_a_loop_over_epochs_around_all_updates_without_the_scheduler():
    plan = Plan(SCHEDULE, 100)
    assert len(list(plan)) == 21
    warned(lambda: iter(plan), "has given all 21 batches, and begins again after 0 updates")
    plan = Plan(SCHEDULE, 100)
    for _ in range(2):
        plan.start = 0  # on purpose
        assert len(list(plan)) == 21

class Short(Plan):
    def order(self, epoch): return list(range(90))

def test_an_order_without_some_of_the_samples():
    with pytest.raises(ValueError, match="has 90 of 100 samples"): list(Short(SCHEDULE, 100))

class Anew(Plan):
    def order(self, epoch): return torch.randperm(self.samples)

class Shuffled(Plan):
    kept = torch.arange(100)
    def order(self, epoch):
        self.kept[:] = self.kept[torch.randperm(100)]
        return self.kept

@pytest.mark.parametrize("kind", [Anew, Shuffled])
def test_an_order_that_differs_each_time(kind):
    with pytest.raises(ValueError, match=r"order\(0\) differs each time"): list(kind(SCHEDULE, 100))

@pytest.mark.parametrize("rolled_back", [
    lambda plan, state: setattr(plan, "start", 5), lambda plan, state: plan.load_state_dict(state)])
def test_a_pass_does_not_go_back(rolled_back):
    plan, loader, optimizer, scheduler = parts()
    def train():
        for _ in loader:
            step(optimizer, scheduler)
            if plan.start == 5: saved = plan.state_dict()
            if plan.start == 11: break
        for _ in loader:
            step(optimizer, scheduler)
            if plan.start == 13: rolled_back(plan, saved)
            if plan.start == 6: return
    warned(train, "plan.start was set back to 5, but this pass goes on with update", here=False)

def test_a_stream_of_other_micro_batches():
    plan, dataset = Plan(SCHEDULE, 100, micro_batch=4, drop_last=True), TensorDataset(torch.arange(100))
    for loader, line in ((DataLoader(dataset, batch_size=8), "batch_size is 8, but the plan's micro_batch 4"),
                         (DataLoader(dataset, batch_sampler=plan), "batches are the plan's already")):
        with pytest.raises(ValueError, match=line): plan.accumulate(loader)
    for loader in (DataLoader(dataset, batch_size=4), DataLoader(dataset, batch_size=None)): plan.accumulate(loader)
    prefetched = ({"x": x, "name": "n"} for x, in DataLoader(dataset, batch_size=8))
    warned(lambda: next(plan.accumulate(prefetched)), "a micro-batch of the stream has 8 samples, but")

def test_a_short_micro_batch_among_whole_ones():
    plan = Plan(fixed(16, 0.1, epochs=1), 100, micro_batch=4)
    stream = (x for _ in range(9) for x, in DataLoader(TensorDataset(torch.arange(10)), batch_size=4))
    warned(lambda: list(itertools.islice(plan.accumulate(stream), 6)), "has 2 samples, but the plan's micro_batch is 4",
           here=False)

def test_a_stream_that_begins_anew():
    plan, loader = Plan(fixed(8, 0.1, epochs=1), 64, micro_batch=4), DataLoader(TensorDataset(torch.arange(99)), 4)
    optimizer = sgd()
    scheduler = plan.lr_scheduler(optimizer)
    def some(stream):
        for part, _ in itertools.islice(plan.accumulate(stream), 4):
            if part.last: step(optimizer, scheduler)
    next(plan.accumulate(loader))  # a look
    some(loader)
    warned(lambda: some(loader), "the plan goes on, but the stream begins anew", here=False)
    stream, plan.start = iter(loader), 0
    scheduler = plan.lr_scheduler(optimizer)
    plan._progress.warned.clear()
    for _ in range(2): some(stream)

def test_micro_batches_that_are_no_stacks_of_samples():
    image = torch.ones(3, 8, 8)
    nested = torch.nested.nested_tensor([image], layout=torch.jagged)
    for batch in ([(image, 1)] * 4, ((image,) * 4, ({},) * 4), torch.ones(50, 4, 8), [], nested,
                  dict(ids=torch.ones(1, 99), ends=torch.ones(5))):
        next(Plan(fixed(8, 0.1, epochs=1), 64, micro_batch=4).accumulate([batch]))

def test_schedules_that_do_nothing_of_what_they_were_asked():
    for call, line in (
        (lambda: fixed(128, lr=0.1, warmup_epochs=5, base_batch_size=128), "the warm-up does not rise"),
        (lambda: adabatch(64, 1024, lr=0.1, warmup_epochs=5, base_batch_size=128), "which is 0.05"),
        (lambda: fixed(128, lr=0.1, milestones=[32_000, 48_000]), "no milestone lies before the end, epoch 100")):
        warned(call, line)

def test_a_learning_rate_that_is_a_tensor():
    plan, optimizer = Plan(SCHEDULE, 100), sgd(torch.tensor(0.1))
    scheduler, tensor = plan.lr_scheduler(optimizer), optimizer.param_groups[0]["lr"]
    for epoch in plan.by_epoch():
        if epoch == 1: plan.grow()
        for _ in plan:
            assert float(tensor) == pytest.approx(plan.lr(plan.start))
            step(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] is tensor and optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.1)

def test_two_optimizers_of_a_plan_that_grows():
    plan, optimizers = Plan(SCHEDULE, 100), (sgd(), sgd())
    schedulers = [plan.lr_scheduler(optimizer) for optimizer in optimizers]
    states = [scheduler.state_dict() for scheduler in schedulers]
    for epoch in plan.by_epoch():
        if epoch == 1: plan.grow()
        assert [o.param_groups[0]["lr"] for o in optimizers] == 2 * [plan.lr(plan.start)]
        for _ in plan:
            for optimizer, scheduler in zip(optimizers, schedulers): step(optimizer, scheduler)
    for scheduler, state in zip(schedulers, states): scheduler.load_state_dict(state)  # of before the plan grew
    assert plan.updates == 21

def test_a_plan_without_its_scheduler_cannot_count():
    plan = Plan(SCHEDULE, 100)
    for _ in plan: break
    assert warned(lambda: plan.start, "only the loop knows") == 0
    plan.start = 1
    assert plan.start == 1

def test_resumed_in_the_wrong_order():
    def resume(load):
        plan, loader, optimizer, scheduler = parts()
        load(plan, scheduler)
        for _ in loader: step(optimizer, scheduler)
    later = parts()[3]
    for _ in range(5): step(later.optimizer, later)
    warned(lambda: resume(lambda plan, scheduler: setattr(plan, "start", 5)), "set plan.start before making it")
    load = later.state_dict()
    warned(lambda: resume(lambda plan, scheduler: scheduler.load_state_dict(load)), "when resuming, set plan.start")

def test_a_scheduler_that_is_loaded_after_its_optimizer():
    _, _, before, saved = parts()
    for _ in range(20): step(before, saved)
    plan, _, optimizer, _ = parts()
    optimizer.load_state_dict(before.state_dict())
    plan.lr_scheduler(optimizer).load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == before.param_groups[0]["lr"] == plan.lr(20) < 0.1

def test_a_schedulers_state_of_another_plan():
    _, _, optimizer, scheduler = parts()
    for _ in range(14): step(optimizer, scheduler)
    state = scheduler.state_dict()
    older = {name: value for name, value in state.items() if name not in ("samples", "seed", "place")}
    for samples, seed, line in ((130, 0, "(samples, place)"), (100, 5, "(seed)")):
        plan = Plan(SCHEDULE, samples, seed)
        resumed = plan.lr_scheduler(sgd())
        with pytest.raises(ValueError, match="the state is of another plan") as caught: resumed.load_state_dict(state)
        assert line in str(caught.value) and resumed.last_epoch == 0
        resumed.load_state_dict(older)
        assert resumed.last_epoch == 14

def test_epochs_of_a_stateful_loader():
    plan, _, optimizer, scheduler = parts()
    loader = StatefulDataLoader(TensorDataset(torch.arange(100)), batch_sampler=plan)
    for _ in loader:
        step(optimizer, scheduler)
        if plan.start == 14: break
    state, update = loader.state_dict(), plan.state_dict()
    def resumed(load):
        plan = Plan(SCHEDULE, 100)
        loader = StatefulDataLoader(TensorDataset(torch.arange(100)), batch_sampler=plan)
        load(plan)
        loader.load_state_dict(copy.deepcopy(state))
        return [(epoch, len(list(loader))) for epoch in plan.by_epoch()]
    assert resumed(lambda plan: plan.load_state_dict(update)) == [(1, 4), (2, 3)]
    assert warned(lambda: resumed(lambda plan: None), "set plan.start = 14, too", here=False) == [(0, 4), (2, 3)]

# 5. a batch that never reaches its largest size

@pytest.mark.parametrize("sizes, epochs, settings, line", [
    ((256, 4096), 30, {}, "ends at 512, not at max_batch_size 4096: give every=7"),
    ((128, 2048), 10, {}, "ends at 128, not at max_batch_size 2048: give every=2"),
    ((256, 4096), 90, dict(every=30), "ends at 1024, not at max_batch_size 4096: give every=22"),
    ((16, 64), 9, dict(milestones=[4]), "ends at 32, not at max_batch_size 64: give 2 milestones"),
    ((16, 64), 9, dict(milestones=[4, 9]), "ends at 32, not at max_batch_size 64: give 2 milestones"),
    ((16, 256), 2, dict(every=1), "ends at 32, not at max_batch_size 256: give more than 4 epochs"),
    ((16, 256), 1, {}, "ends at 16, not at max_batch_size 256: give more than 4 epochs"),
])
def test_a_batch_that_never_reaches_its_largest(sizes, epochs, settings, line):
    warned(lambda: adabatch(*sizes, lr=0.1, epochs=epochs, **settings), line)

def test_a_milestone_too_close_to_the_end():
    schedule = adabatch(16, 32, lr=0.1, milestones=[2.99], epochs=3)
    warned(lambda: Plan(schedule, 100), "no update is left for the batch of 32")
    assert Plan(schedule, 10_000).at(1869).batch_size == 32

def test_what_reaches_its_largest_is_silent():
    for top, schedule in ((4096, adabatch(256, 4096, lr=0.1, growth=4)), (300, adabatch(100, 300, 0.1, growth=1.5))):
        assert schedule.stages[-1].batch_size == top
    adabatch(64, 64, lr=0.1, epochs=1)
    for every in (7, 6): assert adabatch(256, 4096, lr=0.1, epochs=30, every=every).at(29).batch_size == 4096

def test_a_run_is_named_by_what_it_reaches():
    run = warned(lambda: resolve(Experiment("alexnet", "cifar10", epochs=30)), "ends at 512", here=False)
    assert run.arm == "adabatch-256-512-epochs30" and run.config["max_batch_size"] == 512
    fourfold = resolve(Experiment("alexnet", "cifar10", growth=4.0))
    assert fourfold.arm == "adabatch-256-4096-growth4"
    assert fourfold.schedule.lr(99) / 4096 == pytest.approx(0.01 / 256 * 0.375 ** 4)  # LR / batch falls as by doubling
    text = resolve(Experiment("resnet20", "cifar10")).describe()
    assert "128 (epoch 0, lr 0.01)" in text and "2048 (epoch 80, lr 0.00316406)" in text

def test_a_batch_that_rounds_grows_with_its_learning_rate():
    grown = fixed(5, lr=0.1, epochs=4).grown(2, 1.5).at(2)
    assert grown.lr / grown.batch_size == pytest.approx(0.1 / 5) and grown.batch_size == 8
    with pytest.raises(ValueError, match="too little for a batch of 2"): fixed(2, lr=0.1, epochs=4).grown(2, 1.2)

# 6. schedules read from a curve that is none of this training

def test_a_scheduler_of_other_steps():
    for scheduler, name in (
        (OneCycleLR(sgd(), 0.1, total_steps=1000), "OneCycleLR has total_steps=1000"),
        (CosineAnnealingLR(sgd(), T_max=1000), "CosineAnnealingLR has T_max=1000"),
        (CosineAnnealingLR(sgd(), T_max=5), "CosineAnnealingLR has T_max=5"),
    ):
        with pytest.raises(ValueError, match=f"{name}, but is read for 10"):
            from_lr_schedule(scheduler, 16, 256, epochs=10)

def test_a_curve_without_growth():
    def of_the_epoch(epoch): return 0.1 * 0.1 ** (epoch // 30)
    def read(curve): return warned(lambda: from_lr_schedule(curve, 16, 256, epochs=10), "never grows")
    for curve in (of_the_epoch, lambda progress: 0.1, MultiStepLR(sgd(), [300, 600])):
        assert len(read(curve).stages) == 1
    from_lr_schedule(lambda progress: 0.1, 16, 16, epochs=10)
    for scheduler in (CosineAnnealingLR(sgd(), T_max=10), ExponentialLR(sgd(), 0.7)):
        assert from_lr_schedule(scheduler, 16, 256, epochs=10).stages[-1].batch_size > 16
    from_lr_schedule(CosineAnnealingLR(sgd(), T_max=1000), 16, 256, epochs=10, steps=1000)
    from_lr_schedule(CosineAnnealingLR(sgd(), T_max=999), 16, 256, epochs=10, steps=1000)  # to its very end

# 7. several processes that the plan does not know

def several(settings, line):
    listen("error")  # in a process of its own, where `strict` is not
    with process_group("cpu"):
        rank = torch.distributed.get_rank()
        mine = {name: rank if value == "mine" else value for name, value in settings.items()}
        plan = Plan(SCHEDULE, 100, **mine)
        if line: warned(lambda: [iter(plan), iter(plan)], line)
        else: iter(plan)
        plan.at(0), Plan(SCHEDULE, 100).at(0)  # looking things up is silent

@pytest.mark.parametrize("settings, line", [
    ({}, "give Plan rank and world_size"),
    (dict(rank=0, world_size=3), "give Plan rank and world_size"),
    (dict(rank="mine", world_size=2), None),
])
def test_processes_that_the_plan_does_not_know(settings, line): together(2, several, settings, line)

def test_processes_that_no_group_joins(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    warned(lambda: iter(Plan(SCHEDULE, 100)), "no process group joins them: each makes the whole training")
    iter(Plan(SCHEDULE, 100, rank=1, world_size=2))
    model = small()
    with pytest.raises(ValueError, match="make the Trainer within adabatch.device.process_group"):
        Trainer(model, sgd(model=model), load_data("digits"), SCHEDULE)

def trained_apart(case):
    listen("error")
    with process_group("cpu"):
        rank, model = torch.distributed.get_rank(), small()
        def make(**settings): return Trainer(model, sgd(model=model), load_data("digits"), SCHEDULE, **settings)
        def unfreeze(*_): model[0].requires_grad_(True)
        if case == "seeds": call, line = lambda: make(seed=rank), "the processes have different seeds"
        else:
            model[0].requires_grad_(False)
            call, line = lambda: make().fit(**{case: unfreeze}), "were frozen or unfrozen"
        with pytest.raises(ValueError, match=line): call()

@pytest.mark.parametrize("case", ["seeds", "on_epoch", "on_update"])
def test_processes_that_would_train_apart(case): together(2, trained_apart, case)

# 8. an optimizer with another rate

def test_an_optimizer_with_another_base_rate():
    warm = adabatch(16, 32, lr=0.1, every=2, epochs=4, warmup_epochs=2, base_batch_size=4)  # from 0.1 to 0.4
    plan = Plan(warm, 100)
    line = "was built with lr=0.4, not 0.1: all learning rates will be 4"
    warned(lambda: plan.lr_scheduler(sgd(warm.stages[0].lr)), line)
    plan.lr_scheduler(sgd(0.1))
    groups = torch.optim.SGD([dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.1, 0.01)], lr=1)
    plan.lr_scheduler(groups)
    tensor = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    plan.lr_scheduler(tensor)
    shared = sgd()
    plan = Plan(from_lr_schedule(OneCycleLR(shared, 0.1, total_steps=10), 16, 32, epochs=10), 100)
    warned(lambda: plan.lr_scheduler(shared), "was built with lr=0.004, not 0.1")

# handled, but not in one line of the right kind

def error_of(call, kind):
    with pytest.raises(kind) as caught: call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)

def test_a_checkpoint_of_another_version(tmp_path):
    path = tmp_path / "run.pt"
    trainer().fit(path, {"lr": 0.1})
    saved = files.load_checkpoint(path)
    for name in ("identity", "epoch_sums", "restarts", "division", "rows"):
        files.save_checkpoint(path, {n: v for n, v in saved.items() if n != name})
        assert "another version" in error_of(lambda: trainer().fit(path, {"lr": 0.1}), ValueError)

def test_a_checkpoint_of_another_optimizer(tmp_path):
    def fit(kind, epochs):
        model = small()
        Trainer(model, kind(model.parameters(), lr=0.1), load_data("digits"), fixed(256, 0.1, epochs=epochs)).fit(path)
    path = tmp_path / "run.pt"
    fit(torch.optim.SGD, 1)
    for kind in (torch.optim.Adam, torch.optim.RMSprop):
        with pytest.raises(ValueError, match=rf"another model or optimizer \(SGD, not {kind.__name__}\)"): fit(kind, 1)
    fit(torch.optim.SGD, 1)

def test_parts_that_no_training_can_use():
    lazy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    assert "lazy or meta" in error_of(lambda: trainer(lazy), ValueError)
    assert "lazy or meta" in error_of(lambda: trainer(small().to("meta")), ValueError)
    model = small()
    newton = torch.optim.LBFGS(model.parameters())
    assert "LBFGS" in error_of(lambda: Trainer(model, newton, load_data("digits"), fixed(64, 0.1)), TypeError)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context: assert "no_grad" in error_of(trainer().fit, ValueError)

def test_plans_that_are_none():
    assert Plan(SCHEDULE, 100, world_size=2**53, rank=99).at(0).shard == (8, 8)  # at once
    assert "drop_last must be True or False" in error_of(lambda: Plan(SCHEDULE, 100, drop_last="False"), TypeError)
    assert [Plan(SCHEDULE, 100, drop_last=value).updates for value in (False, 0)] == [24, 24]
    long = Schedule((Stage(0, 1, 0.1),), epochs=2**53)
    assert "updates in the whole training must be at most" in error_of(lambda: Plan(long, 1000), ValueError)

ROW = dict.fromkeys((*record.COUNTS, *record.MEASURES, *record.CLOCKS), 1)

def test_a_record_that_could_not_be_loaded_is_not_saved(tmp_path):
    parts = dict(history=[ROW], config={}, environment={}, status="complete")
    record.save(tmp_path / "good.npz", **parts)
    assert record.load(tmp_path / "good.npz").epochs == 1
    for change, line in (
        (dict(history=[]), "at least one epoch"),
        (dict(history=[dict(ROW, lr="high")]), "could not convert"),
        (dict(history=[{n: v for n, v in ROW.items() if n != "lr"}]), "the history lacks lr"),
        (dict(history=[dict(ROW, updates=2.7)]), "a count must be whole"),
        (dict(config=[1]), "dicts of settings"),
        (dict(environment=None), "dicts of settings"),
        (dict(status="done"), "a status of complete, diverged"),
    ):
        with pytest.raises((ValueError, TypeError), match=line): record.save(tmp_path / "bad.npz", **parts | change)
        assert [path.name for path in tmp_path.iterdir()] == ["good.npz"]

def test_a_record_of_false_size(tmp_path):
    path = tmp_path / "r.npz"
    record.save(path, [ROW], {}, {}, "complete")
    with zipfile.ZipFile(path) as f: members = {name: f.read(name) for name in f.namelist()}
    def write(**others):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as f:
            for name, data in (members | others).items(): f.writestr(name, data)
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1)) | dict(shape=(10**14,))
    with io.BytesIO() as f:
        np.lib.format.write_array_header_1_0(f, header)
        claim = f.getvalue() + bytes(8)
    write(**{"lr.npy": claim})
    assert "claims more numbers than fit" in error_of(lambda: record.load(path), ValueError)
    write(**{"lr.npy": members["lr.npy"], "unknown.npy": bytes(10**8)})  # is not read
    assert record.load(path).epochs == 1
    with io.BytesIO() as f:
        np.save(f, np.zeros(10**7))
        write(**{"lr.npy": f.getvalue()})
    assert "claims more numbers than fit" in error_of(lambda: record.load(path), ValueError)

def test_what_is_no_file_is_not_called_damaged(tmp_path):
    for name in ("a\nb", "a\0b"):
        for read in (record.load, files.load_weights):
            error_of(lambda read=read, path=tmp_path / name: read(path), FileNotFoundError)
    os.mkfifo(tmp_path / "pipe")
    for read in (record.load, files.load_weights, files.load_checkpoint):
        assert "it is a pipe" in error_of(lambda read=read: read(tmp_path / "pipe"), OSError)
        line = error_of(lambda read=read: read(tmp_path), OSError)
        assert "cannot be read (Is a directory" in line and "delete" not in line

def test_a_folder_where_a_file_is_to_go(tmp_path, quick):
    e = Experiment(epochs=2, every=1, max_batch_size=32, device="cpu", output_dir=str(tmp_path))
    for place in (train.weights_path, train.checkpoint_path):
        folder = place(resolve(e))
        folder.mkdir(parents=True)
        assert f"{folder} is a folder" in error_of(lambda: train.run(e), OSError)
        folder.rmdir()

class Full:
    "A file on a disk that is full."
    def __init__(self, file): self.file = file
    def write(self, data): raise OSError(errno.ENOSPC, "No space left on device")
    def flush(self): self.write(b"")
    def __getattr__(self, name): return getattr(self.file, name)

@contextlib.contextmanager
def opened(path, mode):
    with open(path, mode) as f: yield Full(f)

@pytest.mark.parametrize("module, name, full", [(files, "open", opened), (os, "fsync", Full(None).write)])
def test_a_full_disk_is_called_so_and_leaves_what_was_there(tmp_path, monkeypatch, module, name, full):
    def checkpoint(step): files.save_checkpoint(tmp_path / "run.pt", {"step": step})
    def result(status): record.save(tmp_path / "run.npz", [ROW], {}, {}, status)
    checkpoint(1), result("complete")
    monkeypatch.setattr(module, name, full, raising=False)
    for save, value, file in ((checkpoint, 2, "run.pt"), (result, "diverged", "run.npz")):
        line = error_of(lambda save=save, value=value: save(value), OSError)
        assert f"{file} could not be written (No space left on device)" in line
    monkeypatch.undo()
    assert files.load_checkpoint(tmp_path / "run.pt")["step"] == 1
    assert record.load(tmp_path / "run.npz").status == "complete"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.npz", "run.pt"]

def test_the_command_warns_in_one_line(tmp_path, capfd, quick):
    listen("default")
    options = dict(epochs=1, dataset="digits", device="cpu", output_dir=str(tmp_path))
    assert train.main([f"--{name}={value}" for name, value in options.items()]) == 0
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("warning: the batch ends at 16, not at max_batch_size 256")
    assert "adabatch-16-16-epochs1-seed0.npz" in shown.out
