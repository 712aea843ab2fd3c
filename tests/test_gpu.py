import tarfile
import time

import pytest
import torch
from conftest import small

from adabatch import gpu, record, train
from adabatch.experiment import Experiment, resolve
from adabatch.trainer import Trainer


class Slow(Trainer):
    "Takes a second an update."
    def _pause(self, saver):
        time.sleep(1)
        super()._pause(saver)


def test_the_rehearsal_stops_in_time_and_goes_on(tmp_path, monkeypatch, quick, capsys):
    monkeypatch.setattr(gpu, "check", lambda *_: True)
    noise, whole = gpu.load_data("fake"), gpu.order_of_worth
    monkeypatch.setattr(gpu, "load_data", lambda *_: noise)
    monkeypatch.setattr(gpu, "order_of_worth", lambda **settings: whole(**settings)[:4])
    options = ["--rehearse", "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--archive", str(tmp_path / "all.tar")]
    with monkeypatch.context() as slowly:
        slowly.setattr(train, "Trainer", Slow)
        assert gpu.main([*options, "--minutes", "0.15"]) == 0
    assert "the time is up" in capsys.readouterr().out
    under_way, = (tmp_path / "out").rglob("*-seed0.pt")
    assert tarfile.open(tmp_path / "all.tar").getnames() == []
    assert gpu.main([*options, "--minutes", "5"]) == 0
    assert "4 of 4 runs are done" in capsys.readouterr().out
    names = tarfile.open(tmp_path / "all.tar").getnames()
    assert len(names) == 4 and all(n.startswith("fake/") and n.endswith("-seed0.npz") for n in names)
    assert record.load(under_way.with_suffix(".npz")).environment["restarts"] == 1


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, quick, capsys):
    common = dict(epochs=1, data_dir=str(tmp_path / "none"), output_dir=str(tmp_path), device="cpu")
    absent, good = (resolve(Experiment(model, dataset, **common)) for model, dataset in (("resnet50", "imagenet"), ("alexnet", "fake")))
    assert gpu.spend([absent, good], 5) == 1
    assert "FAILED, ValueError" in capsys.readouterr().out and good.path.exists()


def test_after_the_time_is_up_nothing_is_begun(tmp_path, capsys):
    assert gpu.spend([resolve(Experiment(output_dir=str(tmp_path), device="cpu"))], 0) == 0
    assert "the time is up" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_the_check_finds_a_wrong_computation(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "get_model", lambda name: small(torch.float64))
    assert gpu.check("cpu")
    trained = gpu._trained
    monkeypatch.setattr(gpu, "_trained", lambda *a, **k: trained(*a, **k) * (1 + 1e-6 * ("micro_batch" in k)))
    assert not gpu.check("cpu") and "BAD micro-batches" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2 and "no GPU here" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_computes_what_the_cpu_computes():
    assert gpu.check("cuda", compile=True)
