import tarfile

import pytest
import torch
from conftest import small

from adabatch import experiment, gpu


def test_the_rehearsal_stops_in_time_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "get_model", lambda name, classes: small())
    monkeypatch.setattr(gpu, "check", lambda *_: True)
    whole = gpu.order_of_worth
    monkeypatch.setattr(gpu, "order_of_worth", lambda **settings: whole(**settings)[:4])
    options = ["--rehearse", "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--archive", str(tmp_path / "all.tar")]
    assert gpu.main([*options, "--minutes", "0.0001"]) == 0
    first = capsys.readouterr().out
    assert "the time is up" in first
    assert gpu.main([*options, "--minutes", "5"]) == 0
    assert "4 of 4 runs are done" in capsys.readouterr().out
    names = tarfile.open(tmp_path / "all.tar").getnames()
    assert len(names) == 4 and all(n.startswith("fake/") and n.endswith("-seed0.npz") for n in names)


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
