"""Whatever is given, the answer is one line of the documented type, and nothing is written."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from adabatch import record, train
from adabatch.data import load_data
from adabatch.experiment import FIELDS, Experiment, from_notebook, resolve, select
from adabatch.files import load_weights
from adabatch.models import get_model
from adabatch.schedule import adabatch
from adabatch.train import evaluate_weights, main, run

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
    "milestones": ["", ",", "2,,4", "4,2", "2,2", "-2", "2.5", "two", "99999999999999999999"],
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
    "resume": ["", "never"],
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


def cases(groups):
    "A test case for each value, named in few characters."

    def label(value):
        return "".join(c if c.isprintable() and c.isascii() else "?" for c in repr(value)[:24])

    return [pytest.param(name, value, id=f"{name}-{label(value)}") for name in groups for value in groups[name]]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    "Does this call end in one readable line of one of these types, before anything is trained or written?"

    def accepted(*args, **kwargs):
        pytest.fail("was accepted")

    monkeypatch.setattr(train, "make_trainer", accepted)
    monkeypatch.setattr(train.subprocess, "Popen", accepted)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "file").write_text("a file")
    (folder / "loop").symlink_to("loop")
    monkeypatch.chdir(folder)
    before = sorted(tmp_path.rglob("*"))

    def check(call, *kinds):
        with pytest.raises(kinds) as caught:
            call()
        line = str(caught.value)
        assert "\n" not in line and 10 < len(line) < 400, line
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return check


ALSO = {
    "lr_decay": ["the learning rate at 4 epochs"],
    "milestones": ["a milestone must be"],
    "model": ["resnet50 is not made"],
}


@pytest.mark.parametrize("name, value", cases(NUMBERS) + cases(SETTINGS))
def test_values_out_of_range(name, value, refused):
    line = refused(lambda: run(Experiment(**{name: value})), ValueError)
    assert any(words in line for words in (name, *ALSO.get(name, ())))


@pytest.mark.parametrize("name, value", cases(PLACES))
def test_places(name, value, refused):
    refused(lambda: run(Experiment(**{"dataset": "digits", name: value})), ValueError, OSError)


@pytest.mark.parametrize("name, value", cases(TYPES))
def test_types(name, value, refused):
    assert f"{name} must be " in refused(lambda: run(Experiment(**{name: value})), TypeError)


def as_text(groups):
    "The values that a shell can pass on."
    texts = {name: [str(v) for v in values if "\0" not in str(v)] for name, values in groups.items()}
    return cases(texts)


WORDS = {
    "epochs": ["ten", "1e3", "", "1_0 0"],
    "lr": ["small", "0,1", ""],
    "drop_last": ["maybe", "1", ""],
    "processes": ["two", "1.5"],
    "seed": ["None", "0x10"],
    "epohcs": ["3"],
    "no_such_option": ["1"],
}


@pytest.mark.parametrize("name, value", as_text(NUMBERS) + as_text(SETTINGS) + as_text(PLACES) + as_text(WORDS))
def test_the_command_line(name, value, refused, capsys):
    def call():
        try:
            code = main([f"--{name}={value}"])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        raise ValueError(capsys.readouterr().err.removesuffix("\n"))

    assert "error: " in refused(call, ValueError)


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


@pytest.mark.parametrize("name, value", cases(PARAMETERS))
def test_papermill_parameters(name, value, refused):
    def call():
        names = {n: f.default for n, f in FIELDS.items()} | {name: value}
        run(from_notebook(names, ["# Parameters. As they are\nepochs = None", f"# Parameters\n{name} = {value!r}\n"]))

    assert name.replace("dataset", "data set") in refused(call, ValueError, TypeError)


CALLS = {
    "weights that are not there": lambda: evaluate_weights(resolve(Experiment())),
    "grid": lambda: select("everything"),
    "no seeds": lambda: select("digits", seeds=0),
    "seeds without end": lambda: select("digits", seeds=10**12),
    "half a seed": lambda: select("digits", seeds=1.5),
    "a grid's network": lambda: select("digits", model="resnet50"),
    "a grid's data": lambda: select("digits", dataset="mnist"),
    "an epoch in between": lambda: adabatch(16, 256, 0.1).at(2.5),
    "an epoch after the end": lambda: adabatch(16, 256, 0.1).at(100),
    "negative samples": lambda: adabatch(16, 256, 0.1).updates(0, -1),
    "a fraction that is none": lambda: adabatch(16, 256, 0.1).lr(0, math.nan),
    "no data set": lambda: load_data(""),
    "None as data set": lambda: load_data(None),
    "a number as data set": lambda: load_data(5),
    "a long data set": lambda: load_data("x" * 5000),
    "a device that is none": lambda: load_data("digits", device="nowhere"),
    "a device that is a number of thousands of digits": lambda: load_data("digits", device="cuda:" + "9" * 5000),
    "a network": lambda: get_model("lenet", 10),
    "a network of a long name": lambda: get_model("x" * 5000, 10),
    "no classes": lambda: get_model("alexnet", 0),
    "negative classes": lambda: get_model("resnet50", -1),
    "half a class": lambda: get_model("alexnet", 0.5),
    "a record that is a folder": lambda: record.load("."),
    "a record that is a link to itself": lambda: record.load("loop"),
    "a record that is none": lambda: record.load("file"),
    "weights that are none": lambda: load_weights("file"),
    "weights that are a folder": lambda: load_weights("."),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(call, refused):
    refused(call, ValueError, TypeError, OSError)


def test_a_launcher_and_its_environment_that_disagree(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE" in refused(lambda: resolve(Experiment()), ValueError)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun started 2" in refused(lambda: resolve(Experiment(processes=3)), ValueError)


@pytest.mark.parametrize("dataset", ["..", "../here", ".", "../here/.."])
def test_a_record_lies_in_its_output_folder(dataset, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = resolve(Experiment("resnet50", dataset, output_dir="out")).path
    assert Path("out").resolve() in path.resolve().parents and len(path.parts) == 4
