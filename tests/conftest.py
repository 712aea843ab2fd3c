"""Starting real processes, forked from a server that has imported what takes long, so that each starts at once."""

import multiprocessing, os, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from adabatch import train

os.environ["OMP_NUM_THREADS"] = "1"  # in every process that a test starts: rounding depends on the number of threads
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it, and so its children
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["adabatch.sweep", "sklearn.datasets", "torch._dynamo"])

def small(dtype=torch.float32):
    "A network without batch normalisation that trains on digits in a moment; always the same initial weights."
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.Linear(392, 10)
    return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), linear).to(dtype)

def normalised():
    "The same, with batch normalisation."
    return small().insert(1, torch.nn.BatchNorm2d(8))

def _enter(function, rank, size, port, args):
    if size > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(*args)

def start(function, *args, rank=0, size=1, port=0):
    child = processes.Process(target=_enter, args=(function, rank, size, port, args))
    child.start()
    return child

def wait_for(found, alive=lambda: True, seconds=120):
    "Until `found()` is true. Fails if that takes too long, or what is to bring it about is no longer `alive()`."
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline and alive(), "did not come"
        time.sleep(0.02)

def together(size, function, *args, seconds=120):
    "Run `function(*args)` in `size` processes that find one another as torchrun's do. Fails if one of them does."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [start(function, *args, rank=rank, size=size, port=port) for rank in range(size)]
    for child in children: child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children: child.kill()
    assert codes == [0] * size, f"exit codes {codes}"

@pytest.fixture
def quick(monkeypatch):
    "Experiments train a small network instead of the one they name."
    monkeypatch.setattr(train, "get_model", lambda name, classes: small())

@pytest.fixture
def cifar10():
    "The folder of the real images."
    if not Path("data/cifar10").is_dir(): pytest.skip("needs CIFAR-10 as class folders in data/cifar10")
    return "data"

sys.path.insert(0, str(Path(__file__).parent))

def flags(**settings): return [f"--{name}={value}" for name, value in settings.items()]

def at_update(moment, act, progress=train.Silent):
    "A progress that calls `act()` at `moment` = (epoch, updates done)."
    class Acting(progress):
        def on_update(self, epoch, update, updates):
            if (epoch, update) == moment: act()
    return Acting

def program(*words, **settings):
    "Start it in a session of its own, with both outputs in one pipe."
    outputs = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, *map(str, words)], **outputs | settings)

def papermill(folder, notebook="run"):
    "The command that executes a notebook with its outputs in the folder; parameters may follow."
    command = [sys.executable, "-m", "papermill", f"nbs/{notebook}.ipynb", str(folder / "out.ipynb")]
    return [*command, "--no-progress-bar", "-p", "output_dir", str(folder)]
