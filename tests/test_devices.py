"""What the trainer promises of devices that this machine may not have: fakes where a CPU can tell."""

import atexit, contextlib, os, signal, time, weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import small, start, together, wait_for

from adabatch import WrongValue, device as devices, experiment, train, trainer as engine
from adabatch.data import load_data
from adabatch.device import Interrupted, World, process_group
from adabatch.experiment import Experiment, resolve
from adabatch.schedule import adabatch, fixed
from adabatch.trainer import Trainer

def trainer(schedule, model=None, **settings):
    model = model or small()
    data = load_data("digits")
    data.train_size, data.test_size = 128, 50
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), data, schedule, **settings)

GROWING = adabatch(32, 64, lr=0.02, every=1, epochs=2)

@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

# --- the process group (2)

@pytest.mark.parametrize("error", [None, Interrupted("stopped", signal.SIGTERM), RuntimeError("broken")])
def test_the_group_is_left_only_when_all_leave_it(monkeypatch, error):
    calls = []
    monkeypatch.setattr(devices, "_rendezvous", dict)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: calls.append("joined"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda *a: calls.append("left"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.suppress(RuntimeError, Interrupted), process_group("cpu"):
        if error: raise error
    assert calls == (["joined"] if isinstance(error, RuntimeError) else ["joined", "left"])

def leave():
    with process_group("cpu"):
        world = World()
        world.on_rank_0(int)
    atexit._run_exitfuncs()
    left = [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]
    assert world.size == 2 and not [name for name in left if "gloo" in name], left

def test_no_thread_of_a_group_is_left_to_abort_the_process_at_its_exit():
    together(2, leave)

# --- which device, and who says so (3, 8)

def test_one_gpu_for_several_processes_is_refused(monkeypatch, two_gpus):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device cuda:1 is one GPU for 2 processes"), process_group("cuda:1"): pass

def test_more_processes_than_gpus_are_refused_before_they_are_started(monkeypatch, two_gpus, tmp_path):
    monkeypatch.setattr(train.subprocess, "Popen", lambda *a, **k: pytest.fail("processes were started"))
    run = resolve(Experiment(device="cuda", processes=3, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="processes is 3, but this machine has 2 GPUs"): train.launch(run)

@pytest.mark.parametrize("rank, everywhere, said", [
    ("0", False, "error: no\n"), ("2", False, "error: rank 2: no\n"), ("2", True, ""), ("0", True, "error: no\n")])
def test_a_refusal_names_its_rank_and_is_said_once(monkeypatch, capsys, rank, everywhere, said):
    def refuse():
        error = WrongValue("no")
        if everywhere: error.from_rank_0 = True
        raise error
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    assert experiment.exit_code(refuse) == 2 and capsys.readouterr().err == said

@pytest.mark.filterwarnings("ignore:the batch ends at 16")
def test_a_world_of_one_needs_no_rank(monkeypatch, tmp_path, quick):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"): monkeypatch.delenv(name, raising=False)
    assert train.run(Experiment(epochs=1, every=1, device="cpu", output_dir=str(tmp_path))).status == "complete"

# --- trying a size (4, 5)

class Watched(torch.nn.Module):
    "Notes the sizes of its batches, and whether gradients are there when it is called."
    def __init__(self):
        super().__init__()
        self.net, self.calls = small(), []

    def forward(self, x):
        if self.training: self.calls.append((len(x), self.net[0].weight.grad is not None))
        return self.net(x)

def test_every_stage_is_tried_twice_before_anything_is_trained(monkeypatch):
    t, order = trainer(GROWING, Watched()), []
    t.micro_batch.tries_memory = True
    update, synchronize = t.step.update, engine.synchronize
    monkeypatch.setattr(t.step, "update", lambda *a: order.append("update") or update(*a))
    monkeypatch.setattr(engine, "synchronize", lambda device: order.append("synchronize") or synchronize(device))
    t.fit()
    assert t.model.calls[:4] == [(32, False), (32, True), (64, False), (64, True)]
    assert order[0] == "synchronize" and order.count("update") == 6

def test_what_a_trial_takes_is_not_training_time(monkeypatch):
    "A device that works off its queue when it is synchronised."
    t = trainer(fixed(32, lr=0.02, epochs=1))
    t.micro_batch.tries_memory, queue = True, []
    monkeypatch.setattr(engine, "try_size", lambda *a: queue.append(0.4))
    monkeypatch.setattr(engine, "synchronize", lambda device: time.sleep(sum(queue)) or queue.clear())
    (row,) = t.fit()
    assert row["resize_seconds"] >= 0.4 and queue == []

def trial_of_two():
    "The trial runs through the wrapped network, and exchanges nothing."
    with process_group("cpu"):
        t = trainer(fixed(32, lr=0.02, epochs=1))
        exchanged, forwards = [], []
        def exchange(state, bucket):
            exchanged.append(1)
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
        t.step.net.register_comm_hook(None, exchange)
        t.step.net.register_forward_pre_hook(lambda module, args: forwards.append(len(args[0])))
        t.micro_batch.tries_memory = True
        engine.prepare(t)
        assert forwards == [16, 16] and exchanged == [], (forwards, exchanged)

def test_the_trial_of_several_processes_exchanges_nothing(): together(2, trial_of_two)

@pytest.mark.parametrize("message", [
    "GET was unable to find an engine to execute this computation", "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 9 GB)"])
def test_memory_errors_of_all_kinds_are_recognised(message): assert engine.out_of_memory(RuntimeError(message))

def test_what_is_no_lack_of_memory_is_raised_and_one_sample_raises_the_original():
    class Broken(Watched):
        error = "mat1 and mat2 shapes cannot be multiplied"
        def forward(self, x):
            if self.training: raise RuntimeError(self.error)
            return self.net(x)
    for text, kind in (("mat1 and mat2", RuntimeError), ("out of memory", MemoryError)):
        t = trainer(GROWING, Broken())
        t.model.error, t.micro_batch.tries_memory = text, True
        with pytest.raises(kind) as raised: t.fit()
        assert text in str(raised.value)

def test_a_batch_that_did_not_fit_is_not_kept_during_the_next_try():
    kept = []
    class Cramped(Watched):
        def forward(self, x):
            held = [tensor() is not None for tensor in kept]
            assert not any(held)
            hidden = 2 * x
            if self.training and len(x) > 10:
                kept.append(weakref.ref(hidden))
                raise torch.OutOfMemoryError("injected")
            return self.net(x)
    t = trainer(GROWING, Cramped())
    t.micro_batch.tries_memory = True
    engine.prepare(t)
    assert len(kept) == 2  # 32, 16; the next stage begins with the limit found

# --- settings of the device (8)

@pytest.fixture
def backends():
    both = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in both]
    yield both
    for b, value in zip(both, before): b.allow_tf32 = value

def test_tf32_is_set_while_training_only(backends):
    for before in (True, False):
        for b in backends: b.allow_tf32 = before
        for precision, expected in (("fp32", False), ("tf32", True)):
            t, seen = trainer(fixed(64, lr=0.02, epochs=1), precision=precision), []
            assert [b.allow_tf32 for b in backends] == [before] * 2  # construction sets nothing
            t.fit(on_update=lambda *_, seen=seen: seen.append([b.allow_tf32 for b in backends]))
            assert seen == [[expected] * 2] * 2 and [b.allow_tf32 for b in backends] == [before] * 2

def test_the_clock_reads_the_trainers_own_device(monkeypatch):
    asked, device = [], torch.device("cuda", 1)
    class Event:
        def __init__(self, enable_timing): pass
        def record(self, stream): asked.append(stream)
        def elapsed_time(self, other): return 2000.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d=None: ("stream", d))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d=None: asked.append(("waited", d)))
    clock = engine.PhaseClock(device)
    clock.start()
    clock.mark("forward")
    assert clock.read()[1] == 2.0 and asked == [("stream", device)] * 2 + [("waited", device)]

@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_seeds_and_waiting_go_to_the_device(monkeypatch, kind):
    calls, device = [], torch.device(kind, 1 if kind == "cuda" else 0)
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "manual_seed", lambda seed: calls.append(seed))
    monkeypatch.setattr(module, "synchronize", lambda *where: calls.append(where))
    state = torch.get_rng_state()
    devices.seed_device(7, device)
    devices.synchronize(device)
    assert calls == [7, (device,) if kind == "cuda" else ()] and torch.equal(torch.get_rng_state(), state)

def test_mps_is_waited_for_before_the_clock_is_read(monkeypatch):
    monkeypatch.setattr(torch.mps, "synchronize", lambda: time.sleep(0.05))
    clock = engine.PhaseClock(torch.device("mps"))
    clock.start()
    clock.mark("forward")
    assert clock.read()[1] >= 0.05

# --- a second signal (8)

def hang(ready):
    with engine.deferred_signals():
        ready.touch()
        while True: time.sleep(0.05)

def test_a_second_signal_ends_a_hung_update(tmp_path):
    child = start(hang, tmp_path / "ready")
    try:
        wait_for((tmp_path / "ready").exists, child.is_alive)
        os.kill(child.pid, signal.SIGTERM)
        child.join(1.5)
        assert child.is_alive()  # the first is left to the trainer
        os.kill(child.pid, signal.SIGTERM)
        child.join(20)
        assert child.exitcode == -signal.SIGTERM
    finally: child.kill()
