"""Whatever is given, the answer is one line of the documented type, and nothing is written."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from adabatch import forecast, gpu, record, report, train
from adabatch.data import Images, load_data, read_ahead
from adabatch.device import process_group
from adabatch.experiment import FIELDS, Experiment, from_notebook, resolve, select, training_samples
from adabatch.files import load_weights
from adabatch.loader import Plan
from adabatch.models import get_model
from adabatch.noise import NoiseScale
from adabatch.schedule import Schedule, Stage, adabatch
from adabatch.train import evaluate_weights, main, run
from adabatch.trainer import Trainer, percent_wrong

HUGE = 10**400
NO_NUMBER = [math.nan, math.inf, -math.inf]
NUMBERS = {  # of the schedule
    "batch_size": [0, -16, 2**64, HUGE, 10**4000],
    "max_batch_size": [0, 8, 48, 10**4000],
    "epochs": [0, -1, 2**64, 10**20, HUGE],
    "every": [0, -1, 10**20],
    "growth": [1, 0.5, -2, 0, HUGE, *NO_NUMBER],
    "lr": [0, -0.1, HUGE, *NO_NUMBER],
    "lr_decay": [0, -0.75, 1e-300, 1e300, HUGE, *NO_NUMBER],
    "warmup_epochs": [-1, 3, HUGE],
    "milestones": ["", ",", "2,,4", "4,2", "2,2", "-2", "2.5", "two", "99999999999999999999",
                   ",".join(map(str, range(1, 90)))],  # a file name of more than 255 characters
}
SETTINGS = {
    "momentum": [-0.1, 1, 1.5, HUGE, *NO_NUMBER],
    "weight_decay": [-1e-4, 1, 1e308, HUGE, *NO_NUMBER],
    "seed": [-1, 2**63, 2**64, HUGE],
    "micro_batch": [0, -1, 2**64, HUGE],
    "processes": [0, -1, 10**6, 2**64],
    "workers": [-1, 10**6, 2**64, HUGE],
    "checkpoint_minutes": [-1, HUGE, *NO_NUMBER],
    "precision": ["", "tf32", "fp16", "FP32", "x" * 5000],
    "device": ["", "gpu", "cpu:x", "cuda:7", "cuda:-1", "cuda:99999999999999999999", "meta", "xla"],
    "resume_from": ["", "x" * 5000],
    "schedule": ["", "cosine", "adabatch ", "x" * 5000],
    "model": ["", "lenet", "resnet50", "../alexnet", "x" * 5000],
}
PLACES = {
    "dataset": ["", "mnist", "nowhere/data", "..", ".", "/", "~", "a\0b", "a\nb", "x" * 5000, "file", "loop"],
    "data_dir": ["", "x" * 5000, "a\0b"],
    "output_dir": ["", "x" * 5000, "a\0b", "file", "file/below", "loop"],
}
TYPES = {
    "epochs": [2.5, "10", [10], np.array([1, 2]), {}, True, b"1", torch.ones(3)],
    "batch_size": [16.0, "16", (16,)],
    "lr": ["0.1", [0.1], np.arange(1000.0), 1j],
    "seed": [None, 0.0, "0"],
    "compile": [1, "True", None],
    "model": [None, 5, b"alexnet", ["alexnet"]],
    "dataset": [None, 5, Path("data"), ["digits"]],
    "output_dir": [None, 5, Path("outputs")],
    "milestones": [[2, 4], 2],
    "device": [torch.device("cpu"), 0],
    "workers": [2.0, "two", True, [1]],
}

def named(groups): return pytest.mark.parametrize("name, values", groups.items(), ids=groups)

@pytest.fixture
def refused(tmp_path, monkeypatch):
    "Does this call end in one readable line of one of these types, before anything is trained or written?"
    def accepted(*args, **kwargs): pytest.fail("was accepted")
    monkeypatch.setattr(train, "make_trainer", accepted)
    monkeypatch.setattr(train.subprocess, "Popen", accepted)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "file").write_text("a file")
    (folder / "loop").symlink_to("loop")
    monkeypatch.chdir(folder)
    before = sorted(tmp_path.rglob("*"))
    def check(call, *kinds):
        with pytest.raises(kinds) as caught: call()
        line = str(caught.value)
        assert "\n" not in line and 10 < len(line) < 400, line
        assert sorted(tmp_path.rglob("*")) == before
        return line
    return check

ALSO = {
    "lr_decay": ["the learning rate at 4 epochs"],
    "milestones": ["a milestone must be"],
    "model": ["resnet50 does not fit"],
}

@named(NUMBERS | SETTINGS)
def test_values_out_of_range(name, values, refused):
    for value in values:
        line = refused(lambda v=value: run(Experiment(**{name: v})), ValueError)
        assert any(words in line for words in (name, *ALSO.get(name, ()))), line

@named(PLACES)
def test_places(name, values, refused):
    for value in values: refused(lambda v=value: run(Experiment(**{"dataset": "digits", name: v})), ValueError, OSError)

@named(TYPES)
def test_types(name, values, refused):
    for value in values: assert f"{name} must be " in refused(lambda v=value: run(Experiment(**{name: v})), TypeError)

@pytest.mark.parametrize("options, line", [
    ("--epochs ten", "argument --epochs: invalid int value: 'ten'"), ("--epochs=1e3", "invalid int value"),
    ("--epochs=", "invalid int value: ''"), ("--epochs -1", "epochs must be at least 1"),
    ("--lr 0,1", "argument --lr: invalid float value: '0,1'"), ("--lr nan", "lr must be positive and finite"),
    ("--drop_last maybe", "'maybe' is neither True nor False"), ("--drop_last=1", "'1' is neither True nor False"),
    ("--processes 1.5", "argument --processes: invalid int value"), ("--seed None", "invalid int value: 'None'"),
    ("--epohcs 3", "unknown option --epohcs: did you mean --epochs?"), ("--no_such_option 1", "unknown option"),
    ("--model lenet", "unknown model 'lenet': choose from alexnet"), ("--dataset mnist", "unknown data set 'mnist'"),
    ("--model resnet50", "resnet50 does not fit digits: choose from alexnet, resnet20, vgg19bn"),
    ("--schedule cosine", "unknown schedule 'cosine': choose from adabatch, fixed"),
    ("--schedule fixed --growth 2", "a fixed schedule has no growth"), ("--batch_size 0", "batch_size must be at"),
    ("--batch_size 32 --max_batch_size 16", "max_batch_size (16) is below batch_size (32)"),
    ("--max_batch_size 48", "times a power of growth"), ("--milestones 4,2", "must be positive and increase"),
    ("--device cuda:7", "device cuda:7 is unavailable"), ("--precision fp8", "unknown precision 'fp8'"),
    ("--output_dir file", "output folder file"), ("--momentum 1.5", "momentum must be below 1"),
])
def test_the_command_line(options, line, refused, capsys):
    def call():
        try: code = main(options.split())
        except SystemExit as stop: code = stop.code
        assert code == 2
        raise ValueError(capsys.readouterr().err.removesuffix("\n"))
    found = refused(call, ValueError)
    assert "error: " in found and line in found

PARAMETERS = {
    "epohcs": [3],
    "modle": ["alexnet"],
    "epochs": ["ten", 1e3, [3], -1],
    "seed": [None, "0"],
    "milestones": [2.5, "a,b"],
    "compile": ["yes"],
    "dataset": ["mnist"],
    "output_dir": [None, ""],
    "_hidden": [1],
}

@named(PARAMETERS)
def test_papermill_parameters(name, values, refused):
    for value in values:
        names = {n: f.default for n, f in FIELDS.items()} | {name: value}
        cells = ["# Parameters. As they are\nepochs = None", f"# Parameters\n%matplotlib inline\n{name} = {value!r}\n"]
        line = refused(lambda n=names, c=cells: run(from_notebook(n, c)), ValueError, TypeError)
        assert name.replace("dataset", "data set") in line

CALLS = {
    "weights that are not there": lambda: evaluate_weights(resolve(Experiment())),
    "grid": lambda: select("everything"),
    "no seeds": lambda: select("digits", seeds=0),
    "seeds without end": lambda: select("digits", seeds=10**12),
    "half a seed": lambda: select("digits", seeds=1.5),
    "a grid's network": lambda: select("digits", model="resnet50"),
    "a grid's data": lambda: select("digits", dataset="mnist"),
    "no data set": lambda: load_data(""),
    "a number as data set": lambda: load_data(5),
    "a long data set": lambda: load_data("x" * 5000),
    "a device that is none": lambda: load_data("digits", device="nowhere"),
    "a device that is a number of thousands of digits": lambda: load_data("digits", device="cuda:" + "9" * 5000),
    "a network of a long name": lambda: get_model("x" * 5000, 10),
    "negative classes": lambda: get_model("resnet50", -1),
    "half a class": lambda: get_model("alexnet", 0.5),
    "a record that is a link to itself": lambda: record.load("loop"),
    "a record that is none": lambda: record.load("file"),
    "weights that are none": lambda: load_weights("file"),
}

@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(call, refused): refused(call, ValueError, TypeError, OSError)

def model(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))

def trainer(network=None, optimizer=None, **settings):
    network = network or model()
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1)
    return Trainer(network, optimizer, load_data("digits"), adabatch(16, 32, 0.1, epochs=2, every=1), **settings)

def mean_wrong(output, targets): return (output.argmax(1) != targets).float().mean()

def groups():
    network = model()
    one, two = network.parameters()
    return trainer(network, torch.optim.SGD([dict(params=[one], lr=0.1), dict(params=[two], lr=0.01)]))

def images(kind=torch.uint8, labels=torch.int64, count=4, first=0, mean=(0,) * 3, std=(1,) * 3):
    y = torch.zeros(count, dtype=labels)
    y[0] = first
    return Images(*[(torch.zeros(4, 3, 8, 8, dtype=kind), y)] * 2, mean, std, 2)

def plan(): return Plan(adabatch(16, 32, 0.1, epochs=2, every=1), 100)
def plain_sgd(lr=0.1): return torch.optim.SGD(model().parameters(), lr=lr)

PARTS = {
    "a precision in other letters": (lambda: trainer(precision="BF16"), "unknown precision 'BF16': choose from fp32"),
    "half a micro-batch": (lambda: trainer(micro_batch=2.5), "micro_batch must be an integer"),
    "another model's optimizer": (
        lambda: trainer(optimizer=plain_sgd()), "the optimizer has none of the model's parameters"),
    "an optimizer that is a class": (lambda: trainer(optimizer=torch.optim.SGD), "must be one of torch.optim"),
    "groups of different rates": (groups, "one learning rate for all parameter groups"),
    "an optimizer with parameters of its own": (
        lambda: trainer(net := model(), torch.optim.SGD([*net.parameters(), torch.nn.Parameter(torch.zeros(1))], 0.1)),
        "parameters that are not the model's"),
    "a test metric with a name that is taken": (
        lambda: trainer(test_metrics={"test_error": percent_wrong}), "the history has its own test_error"),
    "a test metric that is a mean": (lambda: trainer(test_metrics={"wrong": mean_wrong}).fit(),
                                     "the wrong must be summed over the samples"),
    "images of floats": (lambda: images(torch.float32), "images must be uint8 (N, C, H, W) and labels int64"),
    "labels of floats": (lambda: images(torch.uint8, torch.float32), "labels int64 (N,)"),
    "fewer labels than images": (lambda: images(torch.uint8, count=3), "at least one of each"),
    "labels counted from 1": (lambda: images(first=2), "labels must be from 0 to 1, not from 0 to 2"),
    "labels to be ignored": (lambda: images(first=-100), "labels must be from 0 to 1, not from -100"),
    "a mean in bytes": (lambda: images(mean=(125.3, 123.0, 113.9)), "mean and std must be from 0 to 1"),
    "no deviation": (lambda: images(std=(0.25, 0.0, 0.25)), "std above 0"),
    "two channels": (lambda: images(mean=(0.5, 0.5)), "for each of 3 channels (N, C, H, W), not (0.5, 0.5)"),
    "an identity of arrays": (
        lambda: trainer().fit("file.pt", identity=dict(lr=torch.ones(1))), "identity must hold JSON values"),
    "a network at rest": (lambda: NoiseScale(model().requires_grad_(False)).measure(len, torch.ones(4, 1)),
                          "the model has no parameters to train"),
    "an exchange that nobody watched": (lambda: NoiseScale(model()).exchanged(8), "call watch(ddp) first"),
    "a state of something else": (lambda: plan().load_state_dict({"step": 5}), "the state of a plan is {'update'"),
    "a model as optimizer": (lambda: plan().lr_scheduler(model()), "must be one of torch.optim, not Sequential"),
    "an optimizer at rest": (lambda: plan().lr_scheduler(plain_sgd(0.0)), "learning rate is 0: build it with"),
    "a function as curve": (
        lambda: Schedule([Stage(0, 8, 0.1)], epochs=1, curve=float), "curve must be a Curve: from_lr_schedule makes"),
    "results of a folder without records": (lambda: report._write("outptus", "file"), "outptus holds no records"),
    "a forecast without end": (lambda: forecast._command(None, math.inf, None), "seconds must be from 0 to 86,400"),
    "a data set that is not there": (lambda: training_samples(Experiment(dataset="imagenet")), "lacks train/"),
}

@pytest.mark.parametrize("call, line", PARTS.values(), ids=PARTS)
def test_parts_that_do_not_fit(call, line, refused): assert line in refused(call, ValueError, TypeError)

@pytest.mark.parametrize("name, value", [("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "x")])
def test_a_launcher_variable_that_is_no_number(refused, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    def call():
        read_ahead(1, 100)
        with process_group("cpu"): pass
    assert f"the environment variable {name} must be an integer" in refused(call, ValueError)

def test_a_number_of_processes_without_torchrun(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    def call():
        with process_group("cpu"): pass
    assert "torchrun did not start this process" in refused(call, ValueError)

@pytest.mark.parametrize("options, line", [
    (["--minutes", "nan"], "minutes must be from 0"),
    (["--minutes", "inf"], "minutes must be from 0"),
    (["--dataset", "cifar"], "unknown dataset 'cifar': choose from cifar10, cifar100"),
    (["--device", "gpu"], "unknown device 'gpu'"),
])
def test_no_minute_of_a_gpu_is_lost_to_a_typing_error(options, line, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "check", lambda *a: pytest.fail("was begun"))
    assert gpu.main(["--rehearse", "--output_dir=none", *options]) == 2 and line in capsys.readouterr().err

def test_a_launcher_and_its_environment_that_disagree(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE" in refused(lambda: resolve(Experiment()), ValueError)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun started 2" in refused(lambda: resolve(Experiment(processes=3)), ValueError)

def test_a_link_to_a_known_data_set_does_not_rename_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").symlink_to(tmp_path)
    assert resolve(Experiment("alexnet", "digits", output_dir="out")).path.parts[:3] == ("out", "digits", "alexnet")

@pytest.mark.parametrize("dataset", ["..", "../here", ".", "../here/.."])
def test_a_record_lies_in_its_output_folder(dataset, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = resolve(Experiment("resnet50", dataset, output_dir="out")).path
    assert Path("out").resolve() in path.resolve().parents and len(path.parts) == 4
