import contextlib, copy, json, os, signal, time, weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import normalised, small, together
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from adabatch import trainer as engine
from adabatch.data import Images, load_data
from adabatch.device import Interrupted, check_device, process_group
from adabatch.files import save_checkpoint
from adabatch.loader import micro_batches
from adabatch.models import get_model
from adabatch.noise import grow_by, norm
from adabatch.schedule import adabatch, fixed, from_lr_schedule
from adabatch.trainer import Trainer

GROWING = adabatch(16, 32, lr=0.02, every=2, epochs=4)

SAMPLES = 330  # neither 16 nor 32 divides them

def trainer(schedule, model=None, data=None, **settings):
    model = model or small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    return Trainer(model, optimizer, data or Watched(SAMPLES), schedule, **settings)

def clockless(history): return [{k: v for k, v in row.items() if "seconds" not in k} for row in history]
def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

def test_micro_batches_are_cut_equal():
    for samples in range(1, 200):
        for size in range(1, 70):
            sizes = [stop - start for start, stop in micro_batches((7, 7 + samples), size)]
            assert sum(sizes) == samples and max(sizes) <= size and len(sizes) == -(-samples // size)
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) > 1 or samples == 1 or size < 3  # never a piece of one image

# --- however an update is cut

class Watched:
    "Digits, cut down to a few samples, that keeps what it was asked for."
    def __init__(self, samples):
        whole = load_data("digits")
        images = whole.crops[:samples, 4, 4].permute(0, 3, 1, 2)
        self.inner = Images((images, whole.labels[:samples]), [t[:50] for t in whole.test], (0.3,), (0.37,), 10)
        self.device, self.shape, self.train_size, self.test_size = self.inner.device, self.inner.shape, samples, 50
        self.draw, self.test_batches, self.seen = self.inner.draw, self.inner.test_batches, []

    def train_batches(self, epoch, slices):
        for a, b in slices:
            i = epoch.order[a:b]
            drawn = zip(range(a, b), i.tolist())
            self.seen += [[epoch.number, p, n, *epoch.crop[n].tolist(), bool(epoch.flip[n])] for p, n in drawn]
            yield next(self.inner.train_batches(epoch, [(a, b)]))

def cut(folder):
    "Train with batches that divide evenly by 1, 2 and 3 and that do not; leaves weights and samples in `folder`."
    with process_group("cpu"):
        for batch in (126, 128):
            for micro in (None, 7, 64):
                data = Watched(10 * batch)
                t = trainer(fixed(batch, lr=0.02, epochs=1), small(torch.float64), data, micro_batch=micro)
                t.fit()
                name = f"{folder}/{t.world.size}-{batch}-{micro}"
                if t.world.rank == 0: torch.save(weights(t.model), f"{name}.pt")
                with open(f"{name}-{t.world.rank}.json", "w") as f: json.dump(t.data.seen, f)

def test_ten_updates_are_the_same_however_they_are_cut(tmp_path):
    for size in (1, 2, 3): together(size, cut, str(tmp_path))
    for batch in (126, 128):
        reference = torch.load(tmp_path / f"1-{batch}-None.pt")
        samples = json.loads((tmp_path / f"1-{batch}-None-0.json").read_text())
        assert len(samples) == 10 * batch
        for name in (f"{size}-{batch}-{micro}" for size in (1, 2, 3) for micro in (None, 7, 64)):
            assert (torch.load(tmp_path / f"{name}.pt") - reference).norm() < 1e-6 * reference.norm()
            seen = [json.loads(path.read_text()) for path in tmp_path.glob(f"{name}-?.json")]
            assert sorted(sum(seen, [])) == samples  # the same samples, crops and flips at the same positions

def lonely(folder):
    "A batch of two on three processes: one of them has nothing to do."
    with process_group("cpu"):
        t = trainer(fixed(2, lr=0.02, epochs=1), small(torch.float64), Watched(11), drop_last=False)
        history = t.fit()
        if t.world.rank == 0:
            torch.save([weights(t.model), clockless(history)[0]["train_loss"]], f"{folder}/{t.world.size}.pt")

def test_more_processes_than_samples(tmp_path):
    for size in (1, 3): together(size, lonely, str(tmp_path))
    (one, one_loss), (three, three_loss) = (torch.load(tmp_path / f"{size}.pt") for size in (1, 3))
    assert torch.allclose(one, three, rtol=1e-9) and one_loss == pytest.approx(three_loss, rel=1e-9)

def test_an_update_is_that_of_plain_pytorch():
    data = load_data("digits")
    ours = trainer(fixed(1437, lr=0.5, epochs=1), data=data)
    plain = copy.deepcopy(ours.model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9, weight_decay=5e-4)
    x, y = next(data.train_batches(data.draw(0, 0), [(0, 1437)]))
    torch.nn.functional.cross_entropy(plain(x), y).backward()
    optimizer.step()
    history = ours.fit()
    assert torch.allclose(weights(ours.model), weights(plain), rtol=1e-5, atol=1e-7)
    with torch.no_grad(): test = plain(next(data.test_batches([(0, 360)]))[0]).argmax(1) != data.test[1]
    assert history[0]["test_error"] == pytest.approx(100 * test.double().mean().item(), abs=0.3)

def interruptible(folder, stop, *parts):
    "Train in however many processes, the last of which is told to stop at `stop` = (epoch, update), if it is given."
    engine.ASK_SECONDS = 0  # every update is a moment to stop at
    with process_group("cpu"):
        torch.manual_seed(0)
        t = trainer(*(part() for part in parts))
        def interrupt(epoch, update, updates):
            if (epoch, update) == stop and t.world.rank == t.world.size - 1: signal.raise_signal(signal.SIGTERM)
        with contextlib.suppress(Interrupted):
            history = t.fit(f"{folder}/run.pt", on_update=interrupt)
            if t.world.rank == 0: torch.save([weights(t.model), clockless(history)], f"{folder}/done.pt")

def of_three(folder, stop):
    schedule = adabatch(16, 32, lr=0.02, every=1, epochs=2)
    interruptible(folder, stop, lambda: schedule, normalised, lambda: Watched(96))

def test_three_processes_with_batch_normalisation_resume_to_the_bit(tmp_path):
    for name in ("whole", "0-4", "0-6"): (tmp_path / name).mkdir()
    together(3, of_three, str(tmp_path / "whole"), None)
    whole, history = torch.load(tmp_path / "whole/done.pt")
    for stop in ((0, 4), (0, 6)):
        folder = tmp_path / f"{stop[0]}-{stop[1]}"
        together(3, of_three, str(folder), stop)
        assert not (folder / "done.pt").exists()  # one process was told to stop, and all did
        together(3, of_three, str(folder), None)
        again, resumed = torch.load(folder / "done.pt")
        assert torch.equal(again, whole) and history == resumed

# --- interruption

def stopped(path, at, **settings):
    "Train until `at` = (epoch, updates done), and be stopped there."
    def interrupt(epoch, update, updates):
        if (epoch, update) == at: signal.raise_signal(signal.SIGINT)
    data = Watched(SAMPLES)
    with pytest.raises(Interrupted, match=f"stopped by SIGINT after {at[1]} updates of epoch {at[0] + 1}"):
        trainer(GROWING, data=data, **settings).fit(path, on_update=interrupt)
    return data.seen

@pytest.mark.parametrize("at", [(0, 1), (1, 10), (1, 20), (2, 1), (3, 10)])  # also at an epoch's end, after a milestone
def test_resumed_to_the_bit(tmp_path, at):
    whole = trainer(GROWING)
    history = whole.fit()
    before = stopped(tmp_path / "run.pt", at)
    resumed = trainer(GROWING)
    assert clockless(resumed.fit(tmp_path / "run.pt")) == clockless(history)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert before + resumed.data.seen == whole.data.seen
    assert json.dumps(clockless(resumed.history)) == json.dumps(clockless(history))  # integers, too

def test_resumed_with_another_micro_batch_takes_the_same_samples_and_says_so(tmp_path):
    whole = trainer(GROWING)
    history = whole.fit()
    before = stopped(tmp_path / "run.pt", (2, 3)) + stopped(tmp_path / "run.pt", (2, 6), micro_batch=7)
    resumed = trainer(GROWING, micro_batch=7)
    again = resumed.fit(tmp_path / "run.pt")
    assert before + resumed.data.seen == whole.data.seen
    assert [r["micro_batch"] for r in again] == [16, 16, 0, 7]  # 0: cut in two ways
    assert again[-1]["train_loss"] == pytest.approx(history[-1]["train_loss"], rel=1e-4)

def growing(folder, stop): interruptible(folder, stop, lambda: GROWING, lambda: small(torch.float64))

def test_begun_by_three_processes_and_carried_on_by_one(tmp_path):
    for name in ("whole", "moved"): (tmp_path / name).mkdir()
    together(1, growing, str(tmp_path / "whole"), None)
    together(3, growing, str(tmp_path / "moved"), (1, 10))
    together(1, growing, str(tmp_path / "moved"), None)
    (a, history), (b, moved) = (torch.load(tmp_path / name / "done.pt") for name in ("whole", "moved"))
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert [(r["processes"], r["micro_batch"]) for r in moved] == [(3, 6), (1, 0), (1, 32), (1, 32)]
    assert [r["train_loss"] for r in moved] == pytest.approx([r["train_loss"] for r in history], rel=1e-9)

def test_what_is_done_between_updates_is_in_no_phase():
    t = trainer(fixed(64, lr=0.02, epochs=1), data=Watched(640))
    (row,) = t.fit(on_update=lambda *_: time.sleep(0.02))
    assert row["train_seconds"] - sum(row[f"{phase}_seconds"] for phase in engine.PHASES) >= 10 * 0.02

def test_a_device_without_a_number_is_the_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [check_device(d).index for d in ("cuda", "cuda:1", "cpu")] == [0, 1, None]

def test_a_checkpoint_is_written_within_an_epoch_and_is_small(tmp_path, monkeypatch):
    writes = []
    def save(path, state):
        writes.append((state["epoch"], state["update"]))
        save_checkpoint(path, state)
    monkeypatch.setattr(engine, "save_checkpoint", save)
    torch.manual_seed(0)
    model = get_model("resnet20")
    t = trainer(fixed(32, lr=0.1, epochs=1), model, Watched(96))
    t.fit(tmp_path / "run.pt", checkpoint_minutes=0)
    assert writes == [(0, 1), (0, 2), (0, 3), (1, 0)]
    size = sum(v.nbytes for v in model.state_dict().values()) + sum(p.nbytes for p in model.parameters())  # momentum
    assert (tmp_path / "run.pt").stat().st_size <= 1.1 * size
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1

def test_a_checkpoint_of_another_experiment_is_refused(tmp_path):
    trainer(GROWING).fit(tmp_path / "run.pt", {"lr": (0.02, 1)})
    trainer(GROWING).fit(tmp_path / "run.pt", {"lr": (0.02, 1)})  # JSON makes a list of it
    with pytest.raises(ValueError, match=r"run.pt was written with other settings \(lr\)"):
        trainer(GROWING).fit(tmp_path / "run.pt", {"lr": 0.03})

# --- memory, loss, batches

class Cramped(torch.nn.Module):
    def __init__(self, most):
        super().__init__()
        self.net, self.most = small(torch.float64), most

    def forward(self, x):
        if self.training and len(x) > self.most: raise torch.OutOfMemoryError("injected")
        return self.net(x)

def cramped_sample(t, most):
    "Make the trial batch itself raise above `most` samples."
    made = t.micro_batch.sample
    def sample(count):
        if count > most: raise torch.OutOfMemoryError("injected")
        return made(count)
    t.micro_batch.sample = sample

def cramped(folder, where):
    "Only process 1 runs out of memory, and above 10 samples: in the network, or before, for the input."
    most = 10 if int(os.environ.get("RANK", 0)) == 1 else 10**6
    with process_group("cpu"):
        t = trainer(GROWING, Cramped(most if where == "network" else 10**6))
        t.micro_batch.tries_memory = True
        if where == "input": cramped_sample(t, most)
        history = t.fit()
        if t.world.rank == 0:
            torch.save([weights(t.model), [r["micro_batch"] for r in history]], f"{folder}/{t.world.size}.pt")

@pytest.mark.parametrize("where", ["network", "input"])
def test_a_batch_that_does_not_fit_is_cut_in_all_processes_alike(tmp_path, where):
    for size in (1, 2): together(size, cramped, str(tmp_path), where)
    (whole, as_asked), (halved, used) = (torch.load(tmp_path / f"{size}.pt") for size in (1, 2))
    assert as_asked == [16, 16, 32, 32]
    assert used == [8, 8, 8, 8]  # 16 over two is 8; the stage of 32 does not fit with 16
    assert torch.allclose(whole, halved, rtol=1e-9, atol=1e-12)

def test_trying_a_batch_leaves_no_trace():
    t = trainer(GROWING, normalised())
    before = copy.deepcopy(t.model.state_dict())
    assert engine.try_size(t.step, t.micro_batch.sample, 4) is None
    assert all(torch.equal(v, before[k]) for k, v in t.model.state_dict().items())
    assert all(p.grad is None for p in t.model.parameters())

def test_growing_builds_no_loader_and_uses_every_sample_once(monkeypatch):
    monkeypatch.setattr("torch.utils.data.DataLoader.__init__", lambda *a, **k: pytest.fail("a DataLoader was built"))
    t = trainer(GROWING, drop_last=False)
    images = t.data.inner.crops.data_ptr()
    history = t.fit()
    assert t.data.inner.crops.data_ptr() == images
    for epoch in range(4): assert sorted(n for e, _, n, *_ in t.data.seen if e == epoch) == list(range(SAMPLES))
    assert [r["batch_size"] for r in history] == [16, 16, 32, 32]
    dropped = trainer(GROWING).fit()
    assert [r["left_out"] for r in dropped] == [SAMPLES % 16, SAMPLES % 16, SAMPLES % 32, SAMPLES % 32]
    assert {r["left_out"] for r in history} == {0}

def test_warmup_moves_the_learning_rate_update_by_update():
    t = trainer(fixed(16, lr=0.01, epochs=2, warmup_epochs=2, base_batch_size=4))
    lrs = []
    t.fit(on_update=lambda *_: lrs.append(t.optimizer.param_groups[0]["lr"]))
    assert lrs[0] == 0.01 and lrs[20] == pytest.approx(0.025) and lrs[-1] == pytest.approx(0.04 - 0.03 / 40)

def test_phases_are_parts_of_the_epoch():
    for row in trainer(GROWING).fit():
        phases = sum(row[f"{p}_seconds"] for p in engine.PHASES)
        assert 0 < phases <= row["train_seconds"] and all(row[f"{p}_seconds"] > 0 for p in engine.PHASES)
        assert row["forward_seconds_slowest"] == row["forward_seconds"]  # one process

def test_names_of_a_row_are_taken():
    row = trainer(GROWING, noise_every=1).fit()[0]
    assert {name for name in row if not name.endswith(("_seconds", "_slowest"))} == {*engine._ROW}

class Short(Watched):
    "Gives the batches asked for until the last, of which it lacks a part, or all."
    def __init__(self, most):
        super().__init__(SAMPLES)
        self.most = most

    def train_batches(self, drawn, slices):
        *whole, (start, _) = slices
        yield from super().train_batches(drawn, whole + [(start, start + self.most)] * (self.most > 0))

@pytest.mark.parametrize("most", [0, 1])
def test_data_that_gives_fewer_samples_than_asked_for(most):
    with pytest.raises(ValueError, match=f"and gave {most} images and {most} targets"):
        trainer(fixed(64, lr=0.1, epochs=1), data=Short(most)).fit()

def test_precisions_run():
    bf16, fp32 = (trainer(GROWING, precision=p).fit()[-1]["train_loss"] for p in ("bf16", "fp32"))
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.1)

def synchronised(folder):
    "Counts the exchanges of gradients in two updates of four pieces a process."
    with process_group("cpu"):
        t = trainer(fixed(128, lr=0.02, epochs=1), data=Watched(256), micro_batch=16)
        exchanges = []
        def count(state, bucket):
            exchanges.append(bucket.index())
            return allreduce_hook(None, bucket)
        t.step.net.register_comm_hook(None, count)
        t.fit()
        assert exchanges.count(0) == 2, exchanges

def test_only_the_last_piece_of_an_update_exchanges_gradients(tmp_path): together(2, synchronised, str(tmp_path))

# --- recorded passes: on a CPU they are called again

@pytest.fixture
def graphed(monkeypatch): monkeypatch.setattr(engine, "GRAPHED", ("cpu",))

def short(compile, **settings):
    "Growth from 20 to 40 of 110 images, with a network that has batch normalisation."
    growing = adabatch(20, 40, lr=0.02, every=1, epochs=2)
    return trainer(growing, normalised(), Watched(110), compile=compile, **settings)

@pytest.mark.parametrize("settings", [
    {}, {"micro_batch": 7}, {"drop_last": False}, {"micro_batch": 7, "drop_last": False}], ids=str)
def test_recorded_passes_train_as_others_do(graphed, settings):
    plain, recorded = (short(compile, **settings) for compile in (False, True))
    rows = [losses_of(t) for t in (plain, recorded)]
    assert rows[0] == rows[1] and isinstance(recorded.step, engine.GraphedStep) and len(recorded.step.passes) > 1
    pairs = zip(plain.model.state_dict().values(), recorded.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)

def test_a_size_that_a_trigger_asks_for_is_recorded_with_the_largest_first(graphed):
    grow = partial(grow_by, lambda rows: True, max_batch_size=32)
    t = trainer(fixed(16, lr=0.02, epochs=3), normalised(), Watched(330), compile=True, grow=grow)
    assert [row["batch_size"] for row in t.fit()] == [16, 32, 32]
    assert [x[0] for x, *_ in t.step.passes] == [32, 16]

def test_no_shape_is_met_that_was_not_recorded(graphed, monkeypatch):
    t = short(True, micro_batch=7, drop_last=False)
    forward, eager = t.step.forward, []
    monkeypatch.setattr(t.step, "forward", lambda *a: (forward(*a), eager.append(t.step.now is None))[0])
    t.fit()
    assert eager and not any(eager)

def test_a_batch_of_another_kind_is_not_cast_to_the_recorded(graphed):
    t = short(True)
    engine.prepare(t)
    x, y = t.micro_batch.sample(20)
    for kind, recorded in (((x, y), True), ((x.double(), y), False)):
        t.step.forward(t.step.net, *kind)
        assert (t.step.now is not None) == recorded
    assert engine._kind(x, y.int()) not in t.step.passes and engine._kind(x, y[:, None]) not in t.step.passes

def test_recorded_passes_are_resumed(graphed, tmp_path):
    def stop(epoch, update, updates):
        if (epoch, update) == (1, 1): signal.raise_signal(signal.SIGTERM)
    whole = short(True)
    whole.fit()
    with contextlib.suppress(Interrupted): short(True).fit(tmp_path / "run.pt", on_update=stop)
    rest = short(True)
    rest.fit(tmp_path / "run.pt")
    pairs = zip(whole.model.state_dict().values(), rest.model.state_dict().values())
    assert rest.state.restarts == 1 and all(torch.equal(a, b) for a, b in pairs)

def test_recording_and_trying_leave_no_trace_and_gradients_keep_their_memory(graphed):
    t = short(True)
    t.micro_batch.tries_memory = True  # as on a GPU: sizes are tried before they are recorded
    before = [v.clone() for v in t.model.state_dict().values()]
    engine.prepare(t)
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.state_dict().values()))
    assert not any(p.grad.any() for p in t.model.parameters())
    places = [p.grad.data_ptr() for p in t.model.parameters()]
    t.fit()
    assert places == [p.grad.data_ptr() for p in t.model.parameters()]

def test_a_parameter_without_a_gradient_gets_none_from_recording(graphed):
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.idle = small(), torch.nn.Linear(3, 3)
        def forward(self, x): return self.net(x)
    once = fixed(16, lr=0.02, epochs=1)
    plain, recorded = (trainer(once, Idle(), data=Watched(64), compile=compile) for compile in (False, True))
    for t in (plain, recorded): t.fit()
    assert recorded.model.idle.weight.grad is None and torch.equal(weights(plain.model), weights(recorded.model))

def test_an_earlier_trainings_recordings_are_freed_by_the_next(graphed):
    old = short(True)
    old.fit()
    kept = weakref.ref(old.step)
    del old
    short(True)
    assert kept() is None

# --- compiled

def losses_of(t):
    "The loss of each update of a training."
    totals = []
    t.fit(on_update=lambda epoch, update, updates: totals.append((update, t.state.sums.loss.item())))
    return [total - totals[i - 1][1] if update > 1 else total for i, (update, total) in enumerate(totals)]

def compiled(folder):
    "Losses of 22 updates across a milestone, plain and compiled."
    with process_group("cpu"):
        losses = {}
        for compile in (False, True):
            t = trainer(adabatch(16, 32, lr=0.02, every=1, epochs=2), data=Watched(240), compile=compile)
            losses[compile] = losses_of(t), weights(t.model)
        if t.world.rank == 0: torch.save(losses, f"{folder}/{t.world.size}.pt")

@pytest.mark.parametrize("processes", [1, 2])
def test_compiled_and_plain_agree_across_a_milestone(tmp_path, processes):
    together(processes, compiled, str(tmp_path), seconds=300)
    losses = torch.load(tmp_path / f"{processes}.pt")
    (plain, a), (graphs, b) = losses[False], losses[True]
    assert len(plain) == len(graphs) == 22
    assert graphs == pytest.approx(plain, rel=1e-4)
    assert (a - b).norm() < 1e-4 * a.norm()

def test_a_checkpoint_of_another_training_is_refused_in_one_line(tmp_path):
    path = tmp_path / "run.pt"
    trainer(GROWING).fit(path)
    adam = small()
    swapped = Trainer(adam, torch.optim.Adam(adam.parameters()), Watched(SAMPLES), GROWING)
    decayed = trainer(GROWING)
    decayed.optimizer.param_groups[0]["weight_decay"] = 0.5
    for make, line in (
        (lambda: trainer(GROWING, seed=1), "another schedule or seed"),
        (lambda: trainer(fixed(16, lr=0.1, epochs=4)), "another schedule or seed"),
        (lambda: trainer(replace(GROWING, warmup_epochs=1)), "another schedule or seed"),
        (lambda: trainer(replace(GROWING, epochs=5)), "another schedule or seed"),
        (lambda: trainer(GROWING, get_model("alexnet")), "another model or optimizer"),
        (lambda: swapped, "another model or optimizer"),
        (lambda: decayed, r"another model or optimizer \(weight_decay 0"),
    ):
        with pytest.raises(ValueError, match=f"the checkpoint is of {line}") as refused: make().fit(path)
        assert "\n" not in str(refused.value)

def test_a_checkpoint_of_another_curve_is_refused(tmp_path):
    cosine, power = (from_lr_schedule(curve, 16, 16, epochs=2) for curve in (lambda p: 1 - p, lambda p: (1 - p)**3))
    trainer(cosine).fit(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="is of another schedule"): trainer(power).fit(tmp_path / "run.pt")

def test_a_checkpoint_that_could_not_be_loaded_is_noticed_when_it_is_written(tmp_path):
    t = trainer(GROWING)
    t.optimizer.param_groups[0]["weight_decay"] = np.float64(5e-4)
    with pytest.raises(ValueError, match="run.pt holds numpy"): t.fit(tmp_path / "run.pt", checkpoint_minutes=0)
    assert t.state.epoch == 0

def test_a_signal_during_the_last_test_is_not_lost_and_the_folder_is_made(tmp_path):
    path, short = tmp_path / "new/run.pt", fixed(64, lr=0.1, epochs=1)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after epoch 1; saved in"):
        trainer(short).fit(path, on_epoch=lambda epoch, row: signal.raise_signal(signal.SIGTERM))
    assert len(trainer(short).fit(path)) == 1

def test_a_trigger_in_a_warm_up_or_beyond_the_training_set_does_not_end_the_training():
    grow = partial(grow_by, lambda rows: True, max_batch_size=1024)
    warm = fixed(16, lr=0.1, every=2, epochs=5, warmup_epochs=2, base_batch_size=8)
    assert [row["batch_size"] for row in trainer(warm, grow=grow).fit()] == [16, 16, 32, 32, 64]
    with pytest.warns(UserWarning, match="does not grow to 512: the training set has 330"):
        history = trainer(fixed(256, lr=0.01, epochs=22), grow=grow).fit()
    assert {row["batch_size"] for row in history} == {256}
    with pytest.raises(ValueError, match="give the Trainer noise_every"):
        trainer(fixed(16, lr=0.1, epochs=3), grow=partial(grow_by, norm, max_batch_size=64)).fit()
    with pytest.raises(ValueError, match="noise_every of 4 measures 15 of 60 updates, and an estimate takes 20"):
        trainer(fixed(16, lr=0.1, epochs=3), grow=partial(grow_by, norm, max_batch_size=64), noise_every=4)

def test_a_growth_that_was_refused_is_refused_again_when_resumed(tmp_path):
    def growing():
        grow = partial(grow_by, lambda rows: True, max_batch_size=1024, growth=8)
        return trainer(fixed(16, lr=0.01, epochs=14), grow=grow)
    def stop(epoch, row):
        if epoch == 11: signal.raise_signal(signal.SIGTERM)
    with pytest.warns(UserWarning, match="does not grow to 1024"):
        with pytest.raises(Interrupted): growing().fit(tmp_path / "run.pt", on_epoch=stop)
        assert [row["batch_size"] for row in growing().fit(tmp_path / "run.pt")] == [16] + 13 * [128]

def test_a_growth_that_is_not_decided_again_is_refused():
    def once(schedule, rows): return schedule.grown(len(rows), 2) if len(rows) == 1 else schedule
    with pytest.raises(ValueError, match="gave batches of .16, 32, 32., and now .16, 16, 16.; it is given the planned"):
        trainer(fixed(16, lr=0.01, epochs=4), grow=once).fit()

def test_the_new_way_to_ask_for_tf32_is_no_obstacle_on_a_cpu():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"): pytest.skip("this PyTorch has only the old way")
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try: trainer(fixed(64, lr=0.1, epochs=1)).fit()
    finally: matmul.fp32_precision = before
    assert not matmul.allow_tf32

def controls(folder):
    with process_group("cpu"): assert trainer(GROWING).world.control is trainer(GROWING).world.control

def test_trainers_of_several_processes_share_their_control_group(tmp_path): together(2, controls, str(tmp_path))

def test_a_test_that_does_not_fit_into_memory_is_cut(monkeypatch):
    t, whole = trainer(GROWING), trainer(GROWING)
    forward, sizes = t.step.forward_eager, []
    def cramped(net, x, y, *others):
        sizes.append(len(x))
        if len(x) > 13: raise torch.OutOfMemoryError
        return forward(net, x, y, *others)
    monkeypatch.setattr(t.step, "forward_eager", cramped)
    found = engine.evaluate(t.step, t.data)
    assert found == pytest.approx(engine.evaluate(whole.step, whole.data)) and max(sizes[-4:]) <= 13
