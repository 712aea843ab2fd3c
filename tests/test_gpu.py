import contextlib, subprocess, sys, tarfile, time
from dataclasses import replace

import gpu_smoke
import pytest
import torch
from conftest import flags

from adabatch import gpu, record, train
from adabatch.experiment import Experiment, resolve
from adabatch.trainer import Step, Trainer

class Slow(Trainer):
    "Takes a second an update."
    def _pause(self, saver):
        time.sleep(1)
        super()._pause(saver)

@pytest.fixture(scope="module")
def noise(): return gpu.load_data("fake")

@pytest.fixture
def rehearsal(tmp_path, monkeypatch, quick, noise):
    "Options of a rehearsal of four runs, in a process that has just begun."
    load, whole = gpu.load_data, gpu.by_priority
    monkeypatch.setattr(gpu, "check", lambda *_: True)
    monkeypatch.setattr(gpu, "process_seconds", lambda: 0)
    monkeypatch.setattr(gpu, "load_data", lambda name, *a, **k: noise if name == "fake" else load(name, *a, **k))
    monkeypatch.setattr(gpu, "by_priority", lambda **settings: whole(**settings)[:4])
    return ["--rehearse", *flags(device="cpu", output_dir=tmp_path / "out", archive=tmp_path / "all.tar")]

def names(archive): return tarfile.open(archive).getnames()

def test_the_rehearsal_stops_in_time_and_goes_on(tmp_path, monkeypatch, rehearsal, capsys):
    with monkeypatch.context() as slowly:
        slowly.setattr(train, "Trainer", Slow)
        assert gpu.main([*rehearsal, "--minutes", "0.15"]) == 0
    assert "the time is up" in capsys.readouterr().out
    (under_way,) = (tmp_path / "out").rglob("*-seed0.pt")
    (packed,) = names(tmp_path / "all.tar")
    assert packed.endswith(f"/{under_way.name}")  # what is under way is carried away too
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0
    assert "4 of 4 runs are done" in capsys.readouterr().out
    packed = names(tmp_path / "all.tar")
    assert len(packed) == 4 and all(n.startswith("fake/") and n.endswith("-seed0.npz") for n in packed)
    assert record.load(under_way.with_suffix(".npz")).environment["restarts"] == 1

def test_everything_is_packed_after_every_run(tmp_path, monkeypatch, rehearsal):
    counts, make = [], gpu._make
    def count(*args):
        counts.append(len(names(tmp_path / "all.tar")) if (tmp_path / "all.tar").exists() else 0)
        return make(*args)
    monkeypatch.setattr(gpu, "_make", count)
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0 and counts == [0, 1, 2, 3]

def test_the_minutes_count_from_the_start_of_the_process(tmp_path, monkeypatch, rehearsal, capsys):
    monkeypatch.setattr(gpu, "process_seconds", lambda: 301)
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0 and "0 of 4 runs are done" in capsys.readouterr().out

def test_how_long_the_process_has_been_running():
    command = [sys.executable, "-c", "from adabatch import gpu; print(gpu.process_seconds())"]
    begin = time.clock_gettime(time.CLOCK_BOOTTIME)
    seconds = float(subprocess.check_output(command))
    assert 0 < seconds <= time.clock_gettime(time.CLOCK_BOOTTIME) - begin + 0.01  # the system counts hundredths

def test_an_absent_data_set_ends_it_before_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "check", lambda *_: pytest.fail("the check was made"))
    absent = resolve(Experiment("resnet50", "imagenet", data_dir=str(tmp_path / "none"), device="cpu"))
    monkeypatch.setattr(gpu, "by_priority", lambda **settings: [resolve(Experiment(device="cpu")), absent])
    assert gpu.main(["--rehearse", "--output_dir", str(tmp_path / "out")]) == 2
    assert "must hold class folders" in capsys.readouterr().err and not (tmp_path / "out").exists()

def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, quick, capsys):
    settings = dict(dataset="fake", epochs=1, device="cpu", output_dir=str(tmp_path))
    bad, good = (resolve(Experiment(seed=seed, **settings)) for seed in (0, 1))
    make = train.train
    monkeypatch.setattr(gpu, "train", lambda run, data: make(run, data=data) if run is good else 1 / 0)
    assert gpu.run_until([bad, good], gpu.load_all([bad, good]), 300) == 1
    assert "FAILED, ZeroDivisionError" in capsys.readouterr().out and good.path.exists()

# --- the check refuses what is wrong

def no_gradient(step, *args):
    handles = [p.register_hook(torch.zeros_like) for p in step.model.parameters()]
    update(step, *args)
    for handle in handles: handle.remove()

def first_layer_off(step, *args):
    with next(step.model.parameters()).register_hook(lambda g: 1.01 * g): update(step, *args)

def wrong_learning_rate(step, *args):
    for group in step.optimizer.param_groups: group["lr"] *= 1.01
    update(step, *args)

def batch_skipped(step, samples, count, weight, batches, sums, clock):
    skipped = step.skipped = getattr(step, "skipped", 0) + 1
    if skipped == 2:
        for _ in range(count): next(batches)
    else: update(step, samples, count, weight, batches, sums, clock)

update = Step.update
QUESTIONS = [*gpu.exact_questions("cpu"), *(gpu.precision_question("cpu", p) for p in ("fp32", "tf32", "bf16")),
             *(gpu.compile_question("cpu", p) for p in ("fp32", "bf16"))]

@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.text)
def test_every_line_of_the_check_refuses_a_wrong_step(monkeypatch, capsys, question):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # what is asked here is whether the bounds are tight
    change = question.reference()
    question = replace(question, reference=lambda: change)
    assert question.ask()
    for broken in (no_gradient, first_layer_off, wrong_learning_rate, batch_skipped):
        with monkeypatch.context() as patched:
            patched.setattr(Step, "update", broken)
            assert not question.ask(), broken.__name__
    assert capsys.readouterr().out.count("BAD") == 4

def test_the_check_asks_all_and_passes_the_precision_on(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu.Question, "ask", lambda q: asked.append(q.text) or "CPU" not in q.text)
    assert not gpu.check("cpu", "bf16") and len(asked) == 5 and asked[-1] == "device in bf16 against CPU in bf16"

def test_a_compiler_that_raises_is_a_line_and_the_runs_are_made_uncompiled(tmp_path, monkeypatch, rehearsal, capsys):
    def broken(*args, **kwargs): raise RuntimeError("no compiler here")
    monkeypatch.setattr(torch, "compile", broken)
    assert gpu.main([*rehearsal, "--compile", "--minutes", "5"]) == 0
    out = capsys.readouterr().out
    assert "BAD compiled against plain, fp32: RuntimeError: no compiler here" in out and "4 of 4 runs are done" in out

# --- smoke

def test_a_step_of_the_smoke_script_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    ran = []
    for name in ("ten_updates", "clock_agrees", "memory_limit", "interrupted_command", "fit_report"):
        monkeypatch.setattr(gpu_smoke, name, lambda *a, name=name: ran.append(name) or name)
    monkeypatch.setattr(gpu_smoke, "clock_agrees", lambda device: 1 / 0)
    monkeypatch.setattr(gpu.Question, "ask", lambda q: ran.append(q.text) or True)
    assert not gpu_smoke.smoke("cpu", minutes=9, rehearse=True)
    assert "BAD clock" in capsys.readouterr().out
    assert ran[0] == "ten_updates" and ran[-1].startswith("compiled") and len(ran) == 12

def test_memory_that_is_not_halved_is_noticed(monkeypatch):
    assert "micro-batches [256, 256], 1 restart" == gpu_smoke.memory_limit("cpu")
    monkeypatch.setattr(gpu_smoke, "limited_memory", lambda *a: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="512, 512"): gpu_smoke.memory_limit("cpu")

def test_runs_are_taken_in_order_while_they_fit():
    rates = {(m, s): rate for m in ("alexnet", "resnet20", "vgg19bn") for s, rate in ((128, 1e-5), (4096, 5e-6))}
    settings = dict(model="resnet20", dataset="cifar10", schedule="fixed", batch_size=128, device="cpu")
    runs = [resolve(Experiment(epochs=epochs, **settings)) for epochs in (10, 100, 5)]
    one = gpu_smoke.seconds_of(runs[0], rates)
    assert one == pytest.approx(10 * (50_000 + 10_000 / 3) * 1e-5)
    assert gpu_smoke.that_fit(runs, 1.6 * one, rates) == [runs[0], runs[2]]

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys): assert gpu.main([]) == 2 and "no GPU available" in capsys.readouterr().err

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_smoke_script_on_a_gpu(): assert gpu_smoke.smoke("cuda", minutes=9)

def test_two_processes_on_one_device_and_a_difference_between_them(monkeypatch):
    change = gpu_smoke.two_processes("cpu").make()
    question = replace(gpu_smoke.two_processes("cpu"), make=lambda: change)
    assert question.ask()
    monkeypatch.setattr(Step, "update", first_layer_off)  # of the reference, made here
    assert not question.ask()
