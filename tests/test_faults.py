"""Faults from outside: what is killed, taken away, full or set otherwise leaves a whole record or one clear line."""

import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import papermill, start
from test_crash import RUN, TWO_EPOCHS, children, finished, make, wait_for, wait_until_free, worker
from test_record import save

from adabatch import record, train
from adabatch.experiment import Experiment, resolve
from adabatch.files import atomic_write, load_checkpoint, load_weights, save_checkpoint
from adabatch.train import Progress, evaluate_weights, run, weights_path

LONG = "--epochs 500 --every 100 --batch_size 4 --max_batch_size 4 --device cpu --checkpoint_minutes 0".split()
# an epoch takes a minute: within it nothing is printed that would fail for want of a reader

def launched(folder, *options):
    "A launcher of two processes, in a session of its own, and the path of its checkpoint."
    name = "digits/alexnet/adabatch-4-4-epochs500-every100-x2-seed0.pt"
    command = [sys.executable, "-m", "adabatch.train", *LONG, "--processes", "2", "--output_dir", str(folder), *options]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return child, Path(folder, name)

def using(folder):
    "The processes whose command line names the folder."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try: words = path.read_bytes()
        except OSError: continue
        if str(folder).encode() in words and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found

@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    "A test that fails leaves no process behind."
    yield
    for pid in using(tmp_path):
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)

def wait_until_ended(folder, seconds=60):
    deadline = time.monotonic() + seconds
    while using(folder):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.1)

needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")

@needs_proc
def test_a_launcher_that_is_killed_takes_its_processes_along_and_loses_little(tmp_path):
    child, checkpoint = launched(tmp_path)
    wait_for(checkpoint, child)
    assert len(using(tmp_path)) == 4  # launcher, torchrun, two processes
    child.kill()
    child.wait()
    wait_until_ended(tmp_path)
    assert load_checkpoint(checkpoint)["update"] > 0 or load_checkpoint(checkpoint)["epoch"] > 0

@needs_proc
def test_processes_end_when_torchrun_is_killed(tmp_path):
    child, checkpoint = launched(tmp_path)
    wait_for(checkpoint, child)
    (torchrun,) = children(child.pid)
    os.kill(torchrun, signal.SIGKILL)
    output = child.communicate(timeout=90)[0]
    assert child.returncode == 1 and "failed with exit code -9" in output
    wait_until_ended(tmp_path)

@needs_proc
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_answered_with_a_checkpoint_and_its_exit_code(tmp_path, processes, signum):
    child, checkpoint = launched(tmp_path, "--processes", str(processes))
    if processes == 1: checkpoint = Path(str(checkpoint).replace("-x2", ""))
    wait_for(checkpoint, child)
    child.send_signal(signum)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 128 + signum and "run the same command to resume" in output
    wait_until_ended(tmp_path)
    assert load_checkpoint(checkpoint) is not None

@needs_proc
def test_a_second_interrupt_ends_an_update_that_hangs(tmp_path):
    child, checkpoint = launched(tmp_path)
    wait_for(checkpoint, child)
    torchrun = children(child.pid)[0]
    hanging, stopped = (worker(torchrun, rank) for rank in (0, 1))
    os.kill(stopped, signal.SIGSTOP)  # rank 0 waits for its gradients
    child.send_signal(signal.SIGINT)
    time.sleep(2)
    assert child.poll() is None and {torchrun, hanging, stopped} <= set(using(tmp_path))  # the first is still awaited
    child.send_signal(signal.SIGINT)
    while hanging in using(tmp_path): time.sleep(0.02)
    assert stopped in using(tmp_path)  # torchrun, told to end by the first, would at last have killed both together
    os.kill(stopped, signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT and load_checkpoint(checkpoint) is not None

def test_a_second_interrupt_closes_the_pipe_that_the_processes_watch():
    stubborn = "import signal, sys; signal.signal(2, signal.SIG_IGN); print('ready', flush=True)"
    stubborn += "; sys.stdin.read(); print('closed')"
    child = subprocess.Popen(
        [sys.executable, "-c", stubborn], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True)
    timers = [threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]) for seconds in (1, 2)]
    timers.append(threading.Timer(20, child.kill))  # where it is not closed
    for timer in timers: timer.start()
    lines, interrupted = train._pass_on(child)
    timers[-1].cancel()
    assert interrupted and lines == ["ready\n", "closed\n"]

@needs_proc
def test_a_kernel_that_is_killed_takes_its_processes_along(tmp_path):
    parameters = [part for n, v in zip(LONG[::2], LONG[1::2]) for part in ("-p", n[2:], v)]
    command = [*papermill(tmp_path), *parameters, "-p", "processes", "2"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(tmp_path / "digits/alexnet/adabatch-4-4-epochs500-every100-x2-seed0.pt", child)
    kernels = [pid for pid in children(child.pid) if b"ipykernel" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in kernels: os.kill(pid, signal.SIGKILL)
    assert len(kernels) == 1 and "Kernel died" in child.communicate(timeout=120)[0] and child.returncode
    wait_until_ended(tmp_path)

@needs_proc
def test_two_processes_killed_at_random_and_carried_on_by_one_and_by_another_micro_batch(tmp_path):
    base = Experiment(epochs=2, every=1, batch_size=64, max_batch_size=128, device="cpu", checkpoint_minutes=0)
    whole = run(replace(base, output_dir=str(tmp_path / "whole")))
    rng = random.Random(1)
    for k, change in enumerate((dict(processes=1), dict(processes=1, micro_batch=24))):
        folder = tmp_path / str(k)
        command = [sys.executable, "-m", "adabatch.train", *TWO_EPOCHS, "--processes", "2", "--output_dir", str(folder)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoint = folder / "digits/alexnet/adabatch-64-128-epochs2-every1-x2-seed0.pt"
        wait_for(checkpoint, child)
        time.sleep(rng.uniform(0, 0.5))
        for pid in {child.pid, *using(folder)}:  # as when the power goes
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        child.wait()
        wait_until_free(checkpoint.with_suffix(".npz"))
        again = run(replace(base, output_dir=str(folder), **change))
        assert again.environment["restarts"] >= 1
        for name in ("lr", "batch_size", "updates", "samples", "left_out"):
            assert np.array_equal(again.arrays[name], whole.arrays[name])
        assert np.allclose(again.train_loss, whole.train_loss, rtol=1e-3) and np.allclose(
            again.test_loss, whole.test_loss, rtol=1e-2)

@pytest.fixture
def small_disk(tmp_path):
    "A file system of 3 MB."
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode
        == 0)
    if not mounted: pytest.skip("no file system of a chosen size can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)

def test_a_disk_that_is_full_in_the_middle(small_disk, quick):
    e = Experiment(
        epochs=3, every=1, max_batch_size=64, device="cpu", checkpoint_minutes=0, output_dir=str(small_disk / "out"))
    class Fill(train.Silent):
        def on_update(self, epoch, update, updates):
            if (epoch, update) != (1, 10): return
            with pytest.raises(OSError), open(small_disk / "other", "wb") as f:
                while True:
                    f.write(bytes(1 << 16))
                    f.flush()
    with pytest.raises(OSError, match=r"\.pt could not be written .*; the last good checkpoint is kept") as full:
        run(e, Fill())
    assert "\n" not in str(full.value)
    kept = load_checkpoint(train.checkpoint_path(resolve(e)))
    assert (kept["epoch"], kept["update"]) == (1, 9)
    (small_disk / "other").unlink()
    assert record.differences(run(e), run(replace(e, output_dir=str(small_disk / "whole")))) == []

def test_an_output_folder_that_is_removed_under_a_run(tmp_path, quick):
    e = Experiment(
        epochs=3, every=1, max_batch_size=64, device="cpu", checkpoint_minutes=0, output_dir=str(tmp_path / "out"))
    class Remove(train.Silent):
        def on_update(self, epoch, update, updates):
            if (epoch, update) == (1, 10): shutil.rmtree(tmp_path / "out")
    with pytest.raises(
        OSError, match=r"\.pt could not be written \(No such file or directory\); there is no checkpoint") as gone:
        run(e, Remove())
    assert "\n" not in str(gone.value) and not (tmp_path / "out").exists()
    assert run(e).environment["restarts"] == 0

def test_two_processes_that_make_the_same_run_make_one_record(tmp_path):
    whole = finished(tmp_path / "whole")
    children = [start(make, tmp_path / "both") for _ in range(2)]
    for child in children: child.join(90)
    codes = sorted(child.exitcode for child in children)
    assert codes in ([0, 0], [0, 1])  # the second one is refused, or finds the record
    path = resolve(replace(RUN, output_dir=str(tmp_path / "both"))).path
    assert record.differences(whole, record.load(path)) == [] and [p.name for p in path.parent.iterdir()] == [path.name]

def test_two_sweeps_beside_one_another_make_every_run_once(tmp_path):
    command = [sys.executable, "-m", "adabatch.sweep", "--grid", "digits", "--model", "alexnet", "--device", "cpu"]
    command += ["--epochs", "2", "--every", "2", "--jobs", "2", "--executor", "process", "--output_dir", str(tmp_path)]
    sweeps = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=300)[0] for child in sweeps]
    assert [child.returncode for child in sweeps] == [0, 0], outputs
    made = [line for output in outputs for line in output.splitlines() if ": complete: " in line]
    records = {path: record.load(path) for path in tmp_path.glob("digits/alexnet/*.npz")}
    assert len(records) == 4 and all(r.status == "complete" for r in records.values())
    assert {str(path) for path in records} == {line.split()[1].rstrip(":") for line in made}, outputs

@needs_proc
def test_a_sweep_in_the_background_of_a_script_is_stopped_with_its_run(tmp_path):
    "Such a job ignores SIGINT, which a sweep sends to papermill."
    command = [sys.executable, "-m", "adabatch.sweep", "--grid", "digits", "--model", "resnet20", "--device", "cpu"]
    command += ["--checkpoint_minutes", "0", "--output_dir", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    signal.signal(signal.SIGINT, before)
    checkpoint = tmp_path / "digits/resnet20/fixed-16-seed0.pt"
    wait_for(checkpoint, child)
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 128 + signal.SIGTERM and "run the same command to resume" in output
    wait_until_ended(tmp_path)
    wait_until_free(checkpoint.with_suffix(".npz"))  # the kernel has ended too
    assert load_checkpoint(checkpoint) is not None

def test_a_folder_that_may_only_be_read(tmp_path, quick):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o555)
    e = Experiment(epochs=2, every=1, max_batch_size=32, device="cpu", output_dir=str(folder))
    if os.access(folder, os.W_OK):  # root may write anywhere but where the file system is read-only
        if subprocess.run(["mount", "--bind", "-o", "ro", str(folder), str(folder)], capture_output=True).returncode:
            pytest.skip("root, and nothing can be mounted")
    try:
        with pytest.raises(OSError, match="output folder .* cannot be written") as refused: run(e)
        assert "\n" not in str(refused.value) and list(folder.iterdir()) == []
    finally: subprocess.run(["umount", str(folder)], capture_output=True)

def test_no_home_no_language_another_folder(tmp_path):
    environment = {n: v for n, v in os.environ.items() if n not in ("HOME", "LANGUAGE") and not n.startswith("LC_")}
    environment |= {
        "LANG": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(Path.cwd()),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, "-m", "adabatch.train", "--max_batch_size", "16", "--epochs", "1", "--every", "1", "--device",
        "cpu", "--output_dir", "näher", "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stderr == b"" and b"complete: test error" in done.stdout, done
    assert sorted(p.suffix for p in (tmp_path / "näher/digits/alexnet").iterdir()) == [".npz", ".pt"], done

def test_a_clock_that_is_set_back(tmp_path, quick, monkeypatch, capsys):
    e = Experiment(epochs=3, every=1, max_batch_size=64, device="cpu", checkpoint_minutes=0.001)
    whole = run(replace(e, output_dir=str(tmp_path / "whole")))
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    r = resolve(replace(e, output_dir=str(tmp_path / "back")))
    back = run(r, Progress(r))
    assert record.differences(whole, back) == []
    assert (
        all((back.arrays[name] >= 0).all() for name in record.CLOCKS)
        and "-" not in capsys.readouterr().out.split("error")[1])

class Runs:
    "Would make a file if it were unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

def test_no_code_in_a_file_is_run_and_the_file_is_named(tmp_path, quick):
    e = resolve(Experiment(epochs=2, every=1, max_batch_size=32, device="cpu", output_dir=str(tmp_path / "out")))
    run(e)
    trap = tmp_path / "trap"
    for write in (lambda p: torch.save({"weight": Runs(trap)}, p), lambda p: p.write_bytes(pickle.dumps(Runs(trap)))):
        write(weights_path(e))
        with pytest.raises(ValueError, match="seed0.weights.pt is damaged or holds no weights"):
            evaluate_weights(e)
        e.path.unlink(missing_ok=True)
        write(train.checkpoint_path(e))
        with pytest.raises(ValueError, match="seed0.pt: damaged: remove to start this run again"): run(e)
        train.checkpoint_path(e).unlink()
    arrays = {
        n: np.zeros(1, np.int64 if n in record.COUNTS else float)
        for n in (*record.COUNTS, *record.MEASURES, *record.CLOCKS)}
    np.savez(
        e.path,
        **arrays | {"lr": np.array([Runs(trap)], object), "config": "{}", "environment": "{}", "status": "complete"})
    with pytest.raises(ValueError, match="seed0.npz is damaged or not a record"): run(e)
    assert not trap.exists()

def altered(path, rng):
    "The file with one byte changed at a random place."
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)

def equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)

def test_a_checkpoint_with_one_byte_changed_is_refused_or_the_one_before_is_used(tmp_path, capsys):
    states = [{
        "update": k,
        "model": {"weight": torch.randn(50, generator=torch.Generator().manual_seed(k))},
        "columns": ["lr"],
    } for k in (1, 2)]
    path, rng, seen = tmp_path / "run.pt", random.Random(0), []
    for state in states: save_checkpoint(path, state)
    older, newer = (tmp_path / name for name in ("run.pt.previous", "run.pt"))
    whole = newer.read_bytes()
    for _ in range(200):
        newer.write_bytes(whole)
        altered(newer, rng)
        found = load_checkpoint(path)
        seen.append(found["update"])
        assert equal(found, states[found["update"] - 1])
        assert (f"{newer} is damaged" in capsys.readouterr().err) == (found["update"] == 1)
    older.unlink()
    for _ in range(200):
        newer.write_bytes(whole)
        altered(newer, rng)
        try: assert equal(load_checkpoint(path), states[1])  # a date in the zip's directory, say
        except ValueError as error: seen.append(f"{newer}: damaged" in str(error))
    assert seen.count(1) > 50 and False not in seen

def test_a_record_with_one_byte_changed_is_refused_by_name_or_the_same(tmp_path):
    path, rng, refused = tmp_path / "run.npz", random.Random(0), 0
    save(path)
    whole, before = path.read_bytes(), record.load(path)
    for _ in range(200):
        path.write_bytes(whole)
        altered(path, rng)
        try: found = record.load(path)
        except ValueError as error:
            refused += 1
            assert f"{path} is damaged or not a record" in str(error) and "\n" not in str(error)
            continue
        assert all(np.array_equal(found.arrays[n], a) for n, a in before.arrays.items())
        assert (found.config, found.environment, found.status) == (before.config, before.environment, before.status)
    assert refused > 50

def test_weights_with_one_byte_changed_are_refused_by_name_or_the_same(tmp_path):
    path, rng, refused = tmp_path / "run.weights.pt", random.Random(0), 0
    weights = {"weight": torch.randn(500), "bias": torch.randn(10)}
    with atomic_write(path) as f: torch.save(weights, f)
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(whole)
        altered(path, rng)
        try: assert equal(load_weights(path), weights)
        except ValueError as error:
            refused += 1
            assert f"{path} is damaged" in str(error) and "\n" not in str(error)
    assert refused > 50

@pytest.mark.parametrize(
    "weights", [{}, {"weight": torch.ones(3)}, [1], torch.ones(3), {"0.weight": "text"}],
    ids=["empty", "other", "list", "tensor", "text"])
def test_weights_of_another_network_are_refused(tmp_path, weights, quick):
    e = resolve(Experiment(device="cpu", output_dir=str(tmp_path)))
    weights_path(e).parent.mkdir(parents=True)
    torch.save(weights, weights_path(e))
    with pytest.raises(ValueError, match="seed0.weights.pt holds weights of another network") as refused:
        evaluate_weights(e)
    assert "\n" not in str(refused.value)
