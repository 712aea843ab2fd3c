"""Faults from outside: what is killed, taken away, full or set otherwise leaves a whole record or one clear line."""

import contextlib, os, pickle, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import at_update, flags, papermill, program, start, wait_for
from test_crash import children, wait_for_file, wait_until_free, worker
from test_record import save

from adabatch import record, train
from adabatch.experiment import Experiment, resolve
from adabatch.files import atomic_write, load_checkpoint, load_weights, save_checkpoint
from adabatch.sweep import Sweep
from adabatch.train import evaluate_weights, run, weights_path

LONG = "--epochs 500 --every 100 --batch_size 4 --max_batch_size 4 --device cpu --checkpoint_minutes 0".split()
# an epoch takes a minute: within it nothing is printed that would fail for want of a reader

def launched(folder, *options):
    "A launcher of two processes, and the path of its checkpoint."
    name = "digits/alexnet/adabatch-4-4-epochs500-every100-x2-seed0.pt"
    words = ["-m", "adabatch.train", *LONG, "--processes", "2", "--output_dir", folder, *options]
    return program(*words), Path(folder, name)

def using(folder):
    "The processes whose command line names the folder."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try: words = path.read_bytes()
        except OSError: continue
        if str(folder).encode() in words and int(path.parent.name) != os.getpid(): found.append(int(path.parent.name))
    return found

@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    "A test that fails leaves no process behind."
    yield
    for pid in using(tmp_path):
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)

def wait_until_ended(folder): wait_for(lambda: not using(folder), seconds=60)

def test_a_launcher_that_is_killed_takes_its_processes_along_and_loses_little(tmp_path):
    child, checkpoint = launched(tmp_path)
    wait_for_file(checkpoint, child)
    assert len(using(tmp_path)) == 4  # launcher, torchrun, two processes
    child.kill()
    child.wait()
    wait_until_ended(tmp_path)
    assert load_checkpoint(checkpoint)["update"] > 0 or load_checkpoint(checkpoint)["epoch"] > 0

def test_processes_end_when_torchrun_is_killed(tmp_path):
    child, checkpoint = launched(tmp_path)
    wait_for_file(checkpoint, child)
    (torchrun,) = children(child.pid)
    os.kill(torchrun, signal.SIGKILL)
    output = child.communicate(timeout=90)[0]
    assert child.returncode == 1 and "failed with exit code -9" in output
    wait_until_ended(tmp_path)

def test_an_interrupt_is_answered_with_a_checkpoint_and_its_exit_code(tmp_path):
    child, checkpoint = launched(tmp_path)
    wait_for_file(checkpoint, child)
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 128 + signal.SIGTERM and "run the same command to resume" in output
    wait_until_ended(tmp_path)
    assert load_checkpoint(checkpoint) is not None

def test_a_second_interrupt_ends_an_update_that_hangs(tmp_path):
    child, checkpoint = launched(tmp_path)
    wait_for_file(checkpoint, child)
    torchrun = children(child.pid)[0]
    stopped, hanging = (worker(torchrun, rank) for rank in (0, 1))
    os.kill(stopped, signal.SIGSTOP)  # rank 1 waits for its gradients
    child.send_signal(signal.SIGINT)
    time.sleep(2)
    assert child.poll() is None and {torchrun, hanging, stopped} <= set(using(tmp_path))  # the first is still awaited
    child.send_signal(signal.SIGINT)
    wait_for(lambda: hanging not in using(tmp_path))
    assert stopped in using(tmp_path)  # torchrun, told to end by the first, would at last have killed them in order
    os.kill(stopped, signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT and load_checkpoint(checkpoint) is not None

def test_a_kernel_that_is_killed_takes_its_processes_along(tmp_path):
    parameters = [part for n, v in zip(LONG[::2], LONG[1::2]) for part in ("-p", n[2:], v)]
    child = program(*papermill(tmp_path)[1:], *parameters, "-p", "processes", "2")
    wait_for_file(tmp_path / "digits/alexnet/adabatch-4-4-epochs500-every100-x2-seed0.pt", child)
    kernels = [pid for pid in children(child.pid) if b"ipykernel" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in kernels: os.kill(pid, signal.SIGKILL)
    assert len(kernels) == 1 and "Kernel died" in child.communicate(timeout=120)[0] and child.returncode
    wait_until_ended(tmp_path)

@pytest.fixture
def small_disk(tmp_path):
    "A file system of 3 MB."
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system of a chosen size can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)

THREE = dict(epochs=3, every=1, max_batch_size=64, device="cpu", checkpoint_minutes=0)

def test_a_disk_that_is_full_in_the_middle(small_disk, quick):
    e = Experiment(output_dir=str(small_disk / "out"), **THREE)
    def fill():
        with pytest.raises(OSError), open(small_disk / "other", "wb", buffering=0) as f:
            while f.write(bytes(1 << 16)): pass
    with pytest.raises(OSError, match=r"\.pt could not be written .*; the last good checkpoint is kept") as full:
        run(e, at_update((1, 10), fill)())
    assert "\n" not in str(full.value)
    kept = load_checkpoint(train.checkpoint_path(resolve(e)))
    assert (kept["epoch"], kept["update"]) == (1, 9)
    (small_disk / "other").unlink()
    assert record.differences(run(e), run(replace(e, output_dir=str(small_disk / "whole")))) == []

def test_an_output_folder_that_is_removed_under_a_run(tmp_path, quick):
    e = Experiment(output_dir=str(tmp_path / "out"), **THREE)
    line = r"\.pt could not be written \(No such file or directory\); there is no checkpoint"
    with pytest.raises(OSError, match=line) as gone:
        run(e, at_update((1, 10), lambda: shutil.rmtree(tmp_path / "out"))())
    assert "\n" not in str(gone.value) and not (tmp_path / "out").exists()
    assert run(e).environment["restarts"] == 0

def sweeping(folder, out):
    settings = dict(epochs=2, every=2, device="cpu", save_weights=False, output_dir=folder)
    runs = [resolve(Experiment(schedule="fixed", batch_size=size, **settings)) for size in (128, 256)]
    with open(out, "w") as file, contextlib.redirect_stdout(file): assert Sweep(runs, "process", jobs=2).run() == []

def test_two_sweeps_beside_one_another_make_every_run_once(tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]
    sweeps = [start(sweeping, str(tmp_path), out) for out in outputs]
    for child in sweeps: child.join(300)
    text = "".join(out.read_text() for out in outputs)
    assert [child.exitcode for child in sweeps] == [0, 0], text
    made = [line.split()[1].rstrip(":") for line in text.splitlines() if ": complete: " in line]
    records = {path: record.load(path) for path in tmp_path.glob("digits/alexnet/*.npz")}
    assert len(records) == 2 and all(r.status == "complete" for r in records.values())
    assert sorted(made) == sorted(map(str, records)), text

def test_a_sweep_in_the_background_of_a_script_is_stopped_with_its_run(tmp_path):
    "Such a job ignores SIGINT, which a sweep sends to papermill."
    options = dict(grid="digits", model="resnet20", device="cpu", checkpoint_minutes=0, output_dir=tmp_path)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = program("-m", "adabatch.sweep", *flags(**options))
    signal.signal(signal.SIGINT, before)
    checkpoint = tmp_path / "digits/resnet20/fixed-16-seed0.pt"
    wait_for_file(checkpoint, child)
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
    environment |= dict(LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(Path.cwd()))
    options = "--batch_size 256 --max_batch_size 256 --epochs 1 --every 1 --device cpu --output_dir näher --processes 2"
    command = [sys.executable, "-m", "adabatch.train", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stderr == b"" and b"complete: test error" in done.stdout, done
    assert sorted(p.suffix for p in (tmp_path / "näher/digits/alexnet").iterdir()) == [".npz", ".pt"], done

class Runs:
    "Would make a file if it were unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

def test_no_code_in_a_file_is_run_and_the_file_is_named(tmp_path, quick):
    e = resolve(Experiment(epochs=2, every=1, max_batch_size=32, device="cpu", output_dir=str(tmp_path / "out")))
    run(e)
    trap = tmp_path / "trap"
    def save(path): torch.save({"weight": Runs(trap)}, path)
    def pickled(path): path.write_bytes(pickle.dumps(Runs(trap)))
    for write, weights, checkpoint in ((save, "weights.pt holds .*, which may run code", "pt holds .*, which may run"),
                                       (pickled, "weights.pt is damaged or holds no weights", "pt: damaged: remove")):
        write(weights_path(e))
        with pytest.raises(ValueError, match=f"seed0.{weights}"): evaluate_weights(e)
        e.path.unlink(missing_ok=True)
        write(train.checkpoint_path(e))
        with pytest.raises(ValueError, match=f"seed0.{checkpoint}"): run(e)
        train.checkpoint_path(e).unlink()
    names = *record.COUNTS, *record.MEASURES, *record.CLOCKS
    arrays = {n: np.zeros(1, np.int64 if n in record.COUNTS else float) for n in names}
    arrays |= {"lr": np.array([Runs(trap)], object), "config": "{}", "environment": "{}", "status": "complete"}
    np.savez(e.path, **arrays)
    with pytest.raises(ValueError, match="seed0.npz is damaged or not a record"): run(e)
    assert not trap.exists()

def equal(a, b):
    if isinstance(a, record.Record): return record.differences(a, b) == []
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)

def save_weights(path):
    with atomic_write(path) as f: torch.save({"weight": torch.randn(500), "bias": torch.randn(10)}, f)

@pytest.mark.parametrize("name, write, read", [
    ("run.npz", save, record.load),
    ("run.pt", lambda path: save_checkpoint(path, {"step": 1, "weights": torch.randn(50)}), load_checkpoint),
    ("run.weights.pt", save_weights, load_weights),
])
def test_a_file_cut_short_or_with_one_byte_changed_is_refused_by_name_or_read_the_same(tmp_path, name, write, read):
    path, refused = tmp_path / name, 0
    write(path)
    whole, before = path.read_bytes(), read(path)
    for harmed in (whole[: len(whole) // 2], whole[:-1], b""):
        path.write_bytes(harmed)
        with pytest.raises(ValueError, match=f"{name}:? .*damaged.*(delete|remove)"): read(path)
    for i in range(0, len(whole), 11):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        try: assert equal(read(path), before)  # a date in the zip's directory, say
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "damaged" in str(error) and "\n" not in str(error)
    assert refused > len(whole) / 11 / 4

def test_where_a_checkpoint_is_damaged_the_one_before_is_used(tmp_path, capsys):
    path = tmp_path / "run.pt"
    for step in (1, 2): save_checkpoint(path, {"step": step, "weights": torch.arange(5000.0)})
    whole = path.read_bytes()
    for harmed in (whole[:-1], b"", whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        path.write_bytes(harmed)
        assert load_checkpoint(path)["step"] == 1 and f"{path} is damaged and skipped" in capsys.readouterr().err

def test_weights_of_another_network_are_refused(tmp_path, quick):
    e = resolve(Experiment(device="cpu", output_dir=str(tmp_path)))
    weights_path(e).parent.mkdir(parents=True)
    for weights in ({}, {"weight": torch.ones(3)}, [1], torch.ones(3), {"0.weight": "text"}):
        torch.save(weights, weights_path(e))
        with pytest.raises(ValueError, match="seed0.weights.pt holds weights of another network") as refused:
            evaluate_weights(e)
        assert "\n" not in str(refused.value)
