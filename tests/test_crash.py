"""Runs killed at any moment end in the record of a run that was left alone."""

import contextlib, os, random, signal, time
from dataclasses import replace
from pathlib import Path

from conftest import program, small, start, together, wait_for

from adabatch import record, train
from adabatch.experiment import Experiment, resolve
from adabatch.files import lock
from adabatch.train import existing

SETTINGS = dict(epochs=3, every=1, batch_size=128, max_batch_size=512, device="cpu", save_weights=False)
RUN = Experiment(checkpoint_minutes=0, **SETTINGS)  # a checkpoint after every update

def make(folder, pause=None):
    """Make the record of `RUN` with a small network. `pause` = (name of a function of os, how its path ends, count):
    say so in a file and wait, when that function is called for the count-th time for such a path."""
    train.get_model = lambda name, classes: small()
    if pause:
        name, ending, count = pause
        call, calls = getattr(os, name), []
        def watched(*args):
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[-1])
            calls.append(target.endswith(ending))
            if sum(calls) == count:
                Path(folder, "paused").touch()
                time.sleep(60)
            return call(*args)
        setattr(os, name, watched)
    train.run(replace(RUN, output_dir=str(folder)))

def finished(folder, pause=None):
    child = start(make, folder, pause)
    child.join(60)
    assert child.exitcode == 0
    return existing(resolve(replace(RUN, output_dir=str(folder))))

def timed(folder):
    "Its record, and the seconds that it took."
    begin = time.monotonic()
    return finished(folder), time.monotonic() - begin

def killed(folder, moment, length):
    "Begin the run and kill it at that moment: a part of its length, or as `make` takes it. Was it still alive?"
    named = isinstance(moment, tuple)
    child = start(make, folder, moment if named else None)
    if named: wait_for(lambda: (folder / "paused").exists() or not child.is_alive())
    else: time.sleep(moment * length)
    alive = child.is_alive()
    child.kill()
    child.join()
    (folder / "paused").unlink(missing_ok=True)
    return alive

KILLS = int(os.environ.get("KILLS", 20))  # `make torture`: more, at other moments, and several of the same run

def test_killed_at_many_moments(tmp_path):
    finished(tmp_path / "first")  # starts the server that the others are forked from
    whole, length = timed(tmp_path / "whole")
    rng, moments, late = random.Random(0 if KILLS == 20 else None), [], 0
    for _ in range(KILLS // 20):
        moments += [("fsync", ".pt.partial", rng.randint(1, 15)) for _ in range(3)]  # while a checkpoint is written
        moments += [("replace", end, rng.randint(2, 15)) for end in (".pt.previous", ".pt", ".pt")]  # as it is renamed
        moments += [("fsync", ".npz.partial", 1), ("replace", ".npz", 1)]  # while the record is written
        moments += [rng.uniform(0.1, 0.9) for _ in range(12)]  # of a run's length
    for k, moment in enumerate(moments):
        folder = tmp_path / str(k)
        folder.mkdir()
        alive = killed(folder, moment, length)
        assert alive or not isinstance(moment, tuple), moment
        late += not alive
        if not alive: _, length = timed(tmp_path / f"{k} whole")  # other tests kept the machine busy before
        for again in moments[k + 1 : k + rng.randint(1, 4)] if KILLS > 20 else (): killed(folder, again, length)
        assert record.differences(whole, finished(folder)) == [], moment
        left = {p.name for p in (folder / "digits/alexnet").iterdir() if ".npz.lock" not in p.name}
        assert {name for name in left if not name.endswith(".partial")} == {resolve(RUN).path.name}, moment
    assert late <= 0.3 * KILLS, f"{late} timed kills came after the end of the run: they show nothing"

TWO_EPOCHS = "--epochs 2 --every 1 --batch_size 256 --max_batch_size 512 --device cpu --checkpoint_minutes 0".split()

def two_epochs(folder):
    "The same run, left alone."
    train.run(Experiment(epochs=2, every=1, batch_size=256, max_batch_size=512, device="cpu", output_dir=folder))

def children(pid):
    "Their process ids; none if the process has ended."
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []

def worker(torchrun, rank):
    "The process id of a rank, once its first checkpoint is there."
    mark = f"\0RANK={rank}\0".encode()
    return next(child for child in children(torchrun) if mark in b"\0" + Path(f"/proc/{child}/environ").read_bytes())

def wait_for_file(path, launcher): wait_for(path.exists, lambda: launcher.poll() is None)

def wait_until_free(path):
    "The last thread of a killed process frees its memory before it lets go of its lock."
    def free():
        with contextlib.suppress(ValueError), lock(path): return True
    wait_for(free)

def test_a_rank_that_is_killed_ends_the_run_and_a_restart_carries_it_on(tmp_path):
    name = "digits/alexnet/adabatch-256-512-epochs2-every1-x2-seed0"
    together(2, two_epochs, str(tmp_path / "whole"))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1 -m adabatch.train".split()
    restarted = program(*torchrun, *TWO_EPOCHS, "--output_dir", tmp_path / "restarted")
    wait_for_file(tmp_path / "restarted" / f"{name}.pt", restarted)
    os.kill(worker(restarted.pid, 1), signal.SIGKILL)
    output = restarted.communicate(timeout=300)[0]
    assert restarted.returncode == 0, output
    whole, again = (record.load(tmp_path / folder / f"{name}.npz") for folder in ("whole", "restarted"))
    assert record.differences(whole, again) == []
    assert again.environment["restarts"] >= 1 and again.processes.tolist() == [2, 2]
