import contextlib, json, tarfile, time
from dataclasses import replace

import gpu_smoke
import pytest
import torch
from conftest import flags, normalised, small, start, together

from adabatch import gpu, train, trainer as engine
from adabatch.experiment import Experiment, resolve
from adabatch.forecast import samples_per_second
from adabatch.trainer import Step, Trainer

class Slow(Trainer):
    "Takes half a second an update."
    def _pause(self, saver):
        time.sleep(0.5)
        super()._pause(saver)

@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "Small networks, in ResNet-20's place one with batch normalisation: nbs/15_gpu.ipynb asks about the real ones."
    def network(name, classes): return normalised() if name == "resnet20" else small()
    monkeypatch.setattr(train, "get_model", network)
    monkeypatch.setattr(engine, "GRAPHED", engine.GRAPHED)  # a rehearsal changes it
    gpu.kept.cache_clear()

@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "process_seconds", lambda: 0)  # that of the tests is long past
    monkeypatch.setattr(gpu, "SMALL", replace(gpu.SMALL, seconds=0.5))
    return ["--rehearse", *flags(device="cpu", output_dir=tmp_path / "out", archive=tmp_path / "all.tar")]

@pytest.fixture
def rehearsal(options, tmp_path, monkeypatch):
    "Options of a rehearsal of four runs, checked already, in a process that has just begun."
    whole = gpu.arms
    monkeypatch.setattr(gpu, "arms", lambda *a, **settings: whole(*a, **settings)[:3] + whole(*a, **settings)[6:7])
    answered(tmp_path)
    return [*options, "--part", "runs"]

def answered(tmp_path, **found):
    (tmp_path / "out").mkdir(exist_ok=True)
    machine = dict(device=train.device_name(torch.device("cpu")))
    (tmp_path / "out/gpu.json").write_text(json.dumps(dict(machine=machine, rates=[], graphs={}, correct=True) | found))

def names(archive): return [n for n in tarfile.open(archive).getnames() if n.endswith(".npz")]

def test_the_rehearsal_does_everything_in_small(tmp_path, options, capsys):
    assert gpu.main([*options, "--minutes", "10"]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "out/gpu.json").read_text())
    assert "FAILED" not in out and "8 of 8 runs are there" in out and len(names(tmp_path / "all.tar")) == 8
    assert found["correct"] and found["graphs"] == {"alexnet": True, "resnet20": True} and len(found["questions"]) == 11
    assert len({(r["model"], r["layout"], r["compile"]) for r in found["rates"]}) == 6 and len(found["original"]) == 2
    with tarfile.open(tmp_path / "all.tar") as tar: log = tar.extractfile("gpu.log").read().decode()
    assert log.splitlines()[-1] == out.splitlines()[-1]

def test_a_run_begins_only_if_it_can_end_and_what_is_late_is_stopped(tmp_path, monkeypatch, rehearsal, capsys):
    monkeypatch.setattr(train, "Trainer", Slow)
    monkeypatch.setattr(gpu, "seconds_of", lambda run, *a: 1000 if run.experiment.batch_size == 2 else None)
    assert gpu.main([*rehearsal, "--minutes", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "adabatch-2-4-epochs2-every1-seed0.npz: left out, it takes 1000 s and there are" in out
    assert out.count(".npz: the time is up") == 1 and "4 of 4" not in out
    assert f"{len(names(tmp_path / 'all.tar'))} of 4 runs are there" in out

def test_everything_is_packed_after_every_run(tmp_path, monkeypatch, rehearsal):
    counts, make = [], gpu._make
    monkeypatch.setattr(gpu, "_make", lambda *args: counts.append(len(names(tmp_path / "all.tar"))) or make(*args))
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0 and counts == [0, 1, 2, 3]

def test_the_minutes_count_from_the_start_of_the_process(monkeypatch, rehearsal, capsys):
    monkeypatch.setattr(gpu, "process_seconds", lambda: 301)
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0 and "0 of 4 runs are there" in capsys.readouterr().out

def running_since(begin):
    time.sleep(0.1)
    assert 0.1 <= gpu.process_seconds() <= time.clock_gettime(time.CLOCK_BOOTTIME) - begin + 0.01  # it has hundredths

def test_how_long_the_process_has_been_running(): together(1, running_since, time.clock_gettime(time.CLOCK_BOOTTIME))

def test_an_absent_data_set_ends_it_before_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "check", lambda *_: pytest.fail("the check was made"))
    monkeypatch.setattr(gpu, "best_device", lambda: "cuda")
    (tmp_path / "data/cifar10").mkdir(parents=True)
    words = flags(dataset="cifar10", device="cpu", data_dir=tmp_path / "data", output_dir=tmp_path / "out")
    assert gpu.main(words) == 2 and "train is missing" in capsys.readouterr().err and not (tmp_path / "out").exists()

def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, rehearsal, capsys):
    make = train.train
    def broken(run, data): return 1 / 0 if run.experiment.batch_size == 2 else make(run, data=data)
    monkeypatch.setattr(gpu, "train", broken)
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0
    out = capsys.readouterr().out
    assert out.count("FAILED, ZeroDivisionError") == 2 and "2 of 4 runs are there" in out

def test_a_record_that_is_there_is_named_with_its_device(monkeypatch, rehearsal, capsys):
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(gpu, "train", lambda *a, **k: pytest.fail("trained again"))
    assert gpu.main([*rehearsal, "--minutes", "5"]) == 0
    assert capsys.readouterr().out.count("exists, made on cpu (") == 4

def test_nothing_is_trained_where_a_question_of_the_gate_is_answered_badly(tmp_path, monkeypatch, options, capsys):
    monkeypatch.setattr(gpu, "ask", lambda questions: False)
    monkeypatch.setattr(gpu.Question, "ask", lambda question: True)
    monkeypatch.setattr(gpu, "rates_of", lambda *a: pytest.fail("was measured"))
    monkeypatch.setattr(gpu, "train", lambda *a, **k: pytest.fail("was trained"))
    assert gpu.main([*options, "--minutes", "5"]) == 1
    assert gpu.main([*options, "--minutes", "5", "--part", "runs"]) == 1
    assert "the device computes something else" in capsys.readouterr().out

def test_the_second_part_wants_the_first(options, capsys):
    assert gpu.main([*options, "--part", "runs"]) == 2 and "it is written by --part check" in capsys.readouterr().err

def test_the_second_part_wants_it_of_this_machine(tmp_path, options, capsys):
    answered(tmp_path, machine=dict(device="another"))
    assert gpu.main([*options, "--part", "runs"]) == 2
    assert "gpu.json is of another, not of cpu (" in capsys.readouterr().err

def test_a_rehearsal_does_not_write_over_evidence(capsys):
    assert gpu.main(["--rehearse"]) == 2 and "a rehearsal is no evidence" in capsys.readouterr().err

def test_a_check_that_is_late_leaves_out_the_rates(monkeypatch, capsys):
    monkeypatch.setattr(gpu.Question, "ask", lambda question: True)
    monkeypatch.setattr(gpu, "rates_of", lambda *a: pytest.fail("was measured"))
    monkeypatch.setattr(gpu, "original_rates", lambda *a: pytest.fail("was measured"))
    found = gpu.check("cpu", gpu.SMALL, time.monotonic() - 1, lambda found: None)
    assert found["correct"] and found["rates"] == []

def test_who_interrupts_it_ends_it(monkeypatch, rehearsal):
    def interrupted(run, data): raise KeyboardInterrupt
    monkeypatch.setattr(gpu, "train", interrupted)
    with pytest.raises(KeyboardInterrupt): gpu.main([*rehearsal, "--minutes", "5"])

def test_a_step_that_fails_or_is_late_is_a_line(capsys):
    assert gpu.attempt("late", 0.05, lambda: time.sleep(5)) is None
    assert gpu.attempt("wrong", 5, lambda: 1 / 0) is None
    assert gpu.attempt("right", 5, lambda: 6, lambda found: f"found {found}") == 6
    late, wrong, right = capsys.readouterr().out.splitlines()
    assert late.startswith("late: FAILED, TimeoutError: more than 0.05 s [0.")
    assert wrong.startswith("wrong: FAILED, ZeroDivisionError") and right.startswith("right: found 6 [")

# --- which way, and how long

def rows(model, **rates):
    "Of batches of 128 and 2048: fp32_eager=(10, 20)."
    return [dict(model=model, batch_size=size, rates=[rate, rate, 1e9], precision=name.split("_")[0],
                 compile="graphs" in name, layout="NCHW" if "NCHW" in name else "NHWC")
            for name, pair in rates.items() for size, rate in zip((128, 2048), pair)]

TF32 = dict(tf32_eager=(10, 20), tf32_graphs=(30, 40))

@pytest.mark.parametrize("measured, graphs, way", [
    ({}, True, gpu.Way()), (dict(fp32_eager=(10, 20)), True, gpu.Way()),
    (TF32 | dict(bf16_eager=(9, 50), bf16_graphs=(32, 60)), True, gpu.Way("tf32", True)),
    (TF32 | dict(bf16_eager=(9, 50), bf16_graphs=(36, 60)), True, gpu.Way("bf16", True)),
    (TF32 | dict(bf16_eager=(9, 50), bf16_graphs=(36, 60)), False, gpu.Way("tf32")),
    (dict(tf32_eager=(10, 20), tf32_graphs=(8, 40)), True, gpu.Way("tf32"))])
def test_the_way_is_chosen_from_the_rates(measured, graphs, way):
    others = rows("alexnet", bf16_graphs=(900, 900))
    assert gpu.choose_way(rows("resnet20", **measured) + others, "resnet20", graphs) == way

def test_how_long_a_run_will_take():
    def seconds(schedule, *args, **settings):
        run = resolve(Experiment("resnet20", "cifar10", schedule, *args, device="cpu", **settings))
        found = rows("resnet20", tf32_graphs=(1000, 4000), fp32_NCHW=(1, 1)) + rows("vgg19bn", tf32_graphs=(5, 5))
        return gpu.seconds_of(run, found, gpu.Way("tf32", True), 50_000)
    assert seconds("fixed", 128) == pytest.approx(3 + 100 * 50.06)
    assert seconds("fixed", 2048) == pytest.approx(3 + 100 * 12.56)
    assert seconds("adabatch") == pytest.approx(3 + 100 * (50 + 12.5) / 2 + 6)  # five stages, equally spaced
    assert seconds("adabatch", micro_batch=128) == seconds("fixed", 128)
    run = resolve(Experiment("resnet20", "cifar10", device="cpu"))
    assert gpu.seconds_of(run, rows("resnet20", tf32_eager=(1, 1)), gpu.Way("tf32", True), 50_000) is None

def test_the_nine_arms_come_first_each_network_in_its_way():
    ways = dict(resnet20=gpu.Way("tf32", True), vgg19bn=gpu.Way("bf16", True), alexnet=gpu.Way("tf32"))
    runs = gpu.arms("cifar10", ways, device="cuda")
    ends = {"resnet20": "tf32-compile", "vgg19bn": "bf16-compile", "alexnet": "tf32"}
    sizes = {"resnet20": (128, 2048), "vgg19bn": (128, 2048), "alexnet": (256, 4096)}
    assert [f"{r.experiment.model} {r.arm}" for r in runs[:9]] == [
        f"{model} {arm}-{end}" for model, end in ends.items() for small, large in [sizes[model]]
        for arm in (f"adabatch-{small}-{large}", f"fixed-{small}", f"fixed-{large}")]
    assert len(runs) == len(set(runs)) == 9 + 8 + 18
    assert len(gpu.arms("cifar10", ways, graphs=False, device="cuda")) == 9 + 4 + 18

def test_the_other_layout_is_measured_in_that_layout():
    seen, trainer = [], gpu.trainer_of("alexnet", "cpu", gpu.Way(layout="NCHW"), gpu.noise(32), 16)
    forward = trainer.step.forward_eager
    trainer.step.forward_eager = lambda net, x, y: seen.append(x.is_contiguous()) or forward(net, x, y)
    samples_per_second(trainer, 16, 2)
    assert seen == [True, True] and next(trainer.model.parameters()).is_contiguous()

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

def batch_skipped(step, samples, count, weight, batches, *others):
    skipped = step.skipped = getattr(step, "skipped", 0) + 1
    if skipped == 2:
        for _ in range(count): next(batches)
    else: update(step, samples, count, weight, batches, *others)

def no_number(step, *args):
    update(step, *args)
    torch.nn.init.constant_(list(step.model.parameters())[-1], float("nan"))

update = Step.update
BROKEN = no_gradient, first_layer_off, wrong_learning_rate, batch_skipped, no_number
GATE = [*gpu.exact_questions("cpu", samples=64), *gpu.graph_questions("cpu", gpu.ASKED, samples=64)]
GATE = [question for question in GATE if "twice" not in question.text]  # on a CPU the same as against the CPU

@pytest.mark.parametrize("question", GATE, ids=lambda q: q.text)
def test_every_exact_question_refuses_a_wrong_step(monkeypatch, capsys, question):
    monkeypatch.setattr(engine, "GRAPHED", ("cpu",))
    reference = question.reference(seed=0)
    question = replace(question, reference=lambda seed: reference)
    assert question.ask()
    for broken in BROKEN:
        with monkeypatch.context() as patched:
            patched.setattr(Step, "update", broken)
            assert not question.ask(), broken.__name__
    assert capsys.readouterr().out.count("BAD") == len(BROKEN)

@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_questions_of_precision_refuse_what_is_more_than_rounding(monkeypatch, precision):
    (question, _) = gpu.precision_questions("cpu", (precision,), seeds=1, samples=64)
    reference = question.reference(seed=0)
    question = replace(question, reference=lambda seed: reference)
    assert question.ask()
    def off(step, *args):
        with next(step.model.parameters()).register_hook(lambda g: 1.05 * g): update(step, *args)
    for broken in (no_gradient, off, batch_skipped):
        monkeypatch.setattr(Step, "update", broken)
        assert not question.ask(), broken.__name__

def test_a_question_is_asked_for_every_seed_and_nan_is_within_no_bound():
    def question(*apart):
        return gpu.Question("", lambda seed: apart[seed], lambda seed: 0.0, 0.5, lambda a, b: a - b, len(apart))
    assert question(0.1, 0.5).ask() and not question(0.1, 0.6).ask()
    for apart in ((float("nan"), 0.1), (0.1, float("nan"))): assert not question(*apart).ask()
    far = [torch.tensor([1.0]), torch.tensor([float("nan")])], [torch.tensor([1.0]), torch.tensor([1.0])]
    assert gpu.distance(*far) != gpu.distance(*far) and gpu.distance(far[0][::-1], far[1]) != 0

def test_what_the_gpu_showed_first_a_recording_keeps_no_graph_of_its_stream(monkeypatch):
    monkeypatch.setattr(engine, "GRAPHED", ("cpu",))
    trainer = gpu.short("cpu", samples=64, compile=True)
    engine.prepare(trainer)
    assert len(trainer.step.passes) == 2 and not any(p.loss.requires_grad for p in trainer.step.passes.values())

# --- smoke

def test_a_step_of_the_smoke_script_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    ran = []
    for name in ("ten_updates", "clock_agrees", "memory_limit", "interrupted_command"):
        monkeypatch.setattr(gpu_smoke, name, lambda *a, name=name: ran.append(name) or name)
    monkeypatch.setattr(gpu_smoke, "clock_agrees", lambda device: 1 / 0)
    monkeypatch.setattr(gpu.Question, "ask", lambda q: ran.append(q.text) or True)
    assert not gpu_smoke.smoke("cpu", []) and "BAD clock" in capsys.readouterr().out
    assert ran[:3] == ["ten_updates", "ten_updates", "memory_limit"] and len(ran) == 5
    assert gpu_smoke.smoke("cpu", ["memory"]) and len(ran) == 6

def test_memory_that_is_not_halved_is_noticed(monkeypatch):
    assert "micro-batches [256, 256], 1 restart" == gpu_smoke.memory_limit("cpu")
    monkeypatch.setattr(gpu_smoke, "limited_memory", lambda *a: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="512, 512"): gpu_smoke.memory_limit("cpu")

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys): assert gpu.main([]) == 2 and "no GPU available" in capsys.readouterr().err

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_smoke_script_on_a_gpu(): assert gpu_smoke.smoke("cuda", [])

def forked(function, args, nprocs):
    children = [start(function, rank, *args) for rank in range(nprocs)]
    for child in children: child.join(120)
    assert [child.exitcode for child in children] == [0, 0]

def test_two_processes_on_one_device_and_a_difference_between_them(monkeypatch):
    monkeypatch.undo()  # the processes that it starts train the real network
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)
    change = gpu_smoke.two_processes("cpu").make(seed=0)
    question = replace(gpu_smoke.two_processes("cpu"), make=lambda seed: change)
    assert question.ask()
    monkeypatch.setattr(Step, "update", first_layer_off)  # of the reference, made here
    assert not question.ask()
