"""Two nodes and the wire between them, as `nbs/network.ipynb` makes them."""

import json, shutil, signal, subprocess, sys, types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import together, wait_for

from adabatch import forecast, record, train
from adabatch.experiment import Experiment
from adabatch.files import load_checkpoint
from adabatch.forecast import Cluster, Measurement, Rounds, predict
from adabatch.schedule import adabatch, fixed

def cells():
    "The source of the notebook's cells that make nodes."
    found = json.loads(Path("nbs/network.ipynb").read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in found if "wire" in cell["metadata"].get("tags", []))

@pytest.fixture(scope="module")
def network():
    module = types.ModuleType("network")
    exec(cells(), vars(module))
    if reason := module.why_not(): pytest.skip(f"there can be no two nodes here: {reason}")
    return module

def test_nodes_are_gone_when_the_process_that_made_them_is_killed(network, tmp_path):
    program = tmp_path / "program.py"
    start = "nodes[1].start(['-c', 'import time; time.sleep(600)'], nodes=1)"
    lines = "import time", "with two_nodes(100) as nodes:", f"    {start}"
    lines += "    print(*(node.pid for node in nodes), flush=True)", "    time.sleep(600)"
    program.write_text("\n".join([cells(), *lines]))
    maker = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    nodes = [Path("/proc", pid) for pid in maker.stdout.readline().split()]
    names = {(node / "ns/net").readlink() for node in nodes}
    assert len(names) == 2 and all(node.exists() for node in nodes)
    maker.kill()
    maker.communicate()
    def left():
        "Processes that still see one of the two networks."
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try: found += [process] if (process / "ns/net").readlink() in names else []
            except OSError: pass  # it has just ended
        return found
    wait_for(lambda: not left(), seconds=10)

OPTIONS = dict(epochs=2, every=1, batch_size=64, max_batch_size=128, device="cpu", save_weights=False)
SCRIPT = "import sys; sys.path.insert(0, 'tests'); import test_network; test_network.train_wide(sys.argv[1])"

def wide(name, classes):
    "Of layers with many weights that take little time."
    torch.manual_seed(0)
    layers = torch.nn.Linear(3072, 512), torch.nn.ReLU(), torch.nn.Linear(512, classes)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)

def train_wide(folder):
    torch.set_default_dtype(torch.float64)
    train.get_model = wide
    train.run(Experiment(**OPTIONS, checkpoint_minutes=0, output_dir=folder))

def test_a_training_goes_on_after_a_node_was_killed_on_two_nodes_and_on_one(network, tmp_path):
    program, name = tmp_path / "wide.py", "digits/alexnet/adabatch-64-128-epochs2-every1{}-seed0.{}"
    program.write_text(SCRIPT)
    def start(nodes):
        arguments = [str(program), str(tmp_path / "cut")]
        return [node.start(arguments, log=open(tmp_path / f"node{node.rank}.log", "w")) for node in nodes]
    together(2, train_wide, str(tmp_path / "whole"))
    whole = record.load(tmp_path / "whole" / name.format("-x2", "npz"))
    checkpoint = tmp_path / "cut" / name.format("-x2", "pt")
    with network.two_nodes() as nodes:
        processes = start(nodes)
        wait_for(checkpoint.exists)
        nodes[1].kill()
        assert processes[0].wait(120) != 0 and processes[1].wait(10) == -signal.SIGKILL
    assert not checkpoint.with_suffix(".npz").exists()
    alone = tmp_path / "one" / name.format("", "pt")
    alone.parent.mkdir(parents=True)
    shutil.copy(checkpoint, alone)
    saved = load_checkpoint(checkpoint)
    with network.two_nodes() as nodes:
        codes = [process.wait(240) for process in start(nodes)]
        assert codes == [0, 0], "\n".join(path.read_text() for path in sorted(tmp_path.glob("node?.log")))
        sent = nodes[1].sent()
    exchanges = whole.updates[saved["epoch"]:].sum() - saved["update"] + 1  # and one in which the buckets are settled
    gradients = sum(8 * p.numel() for p in wide("", 10).parameters())
    assert 1 < sent / (exchanges * gradients) < 1.05  # 2 (p - 1) / p of them, and headers
    together(1, train_wide, str(tmp_path / "one"))
    two, one = (record.load(path.with_suffix(".npz")) for path in (checkpoint, alone))
    assert record.differences(whole, two) == [] and two.environment["restarts"] == one.environment["restarts"] == 1
    assert two.processes.tolist() == [2, 2] and one.processes[-1] == 1
    for measure in record.MEASURES: np.testing.assert_allclose(one.arrays[measure], whole.arrays[measure], rtol=1e-9)

# --- the prediction

def test_an_update_waits_for_what_the_backward_pass_cannot_hide():
    found = Measurement({16: Rounds((100.0,)), 64: Rounds((200.0,))})
    cluster = Cluster(nodes=4, bandwidth=8e6, latency=0.01)
    growing = adabatch(64, 256, lr=1, growth=4, every=1, epochs=2)
    first, last = 2 * 3 * (0.5 / 4 + 0.01), 2 * 3 * (0.1 / 4 + 0.01)  # seconds to exchange 0.5 and 0.1 MB
    small = 0.16 + first - 2 / 3 * 0.16 + last
    large = 0.32 + first - 2 / 3 * 0.32 + last
    seconds = predict(growing, 512, found, cluster=cluster, buckets=[500_000, 100_000])
    assert seconds.values[0] == pytest.approx(8 * small + 2 * large)

def test_uneven_parts_wait_for_the_largest():
    found = Measurement({42: Rounds((100.0,))})
    three = predict(fixed(128, lr=1, epochs=1), 128, found, cluster=Cluster(nodes=3))
    assert three.values[0] == pytest.approx(0.43)

@pytest.mark.parametrize("options", [
    "--nodes 0", "--nodes 2", "--nodes 2 --bandwidth 25", "--latency 0us", "--bandwidth infGbit",
    "--dataset digits --batch_size 2048 --max_batch_size 2048"])
def test_a_forecast_that_cannot_be_is_rejected_in_one_line(options, capsys):
    try: assert forecast.main(options.split()) == 2
    except SystemExit as stop: assert stop.code == 2
    assert capsys.readouterr().err.splitlines()[-1].count("error: ") == 1
