import json
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell
from conftest import papermill, start

from adabatch import WrongType, WrongValue, experiment, record, sweep, train
from adabatch.device import Interrupted
from adabatch.experiment import FIELDS, Experiment, arguments, from_notebook, resolve, select
from adabatch.files import Busy, lock
from adabatch.sweep import Sweep, status
from adabatch.train import duration, main, run

SHORT = dict(epochs=2, every=1, max_batch_size=32, device="cpu", save_weights=False)

def settings(options): return [part for n, v in options.items() for part in (f"--{n}", str(v))]

@pytest.mark.parametrize("options, line", [
    (dict(model="lenet"), "unknown model 'lenet': choose from alexnet"),
    (dict(dataset="mnist"), "unknown data set 'mnist'"),
    (dict(schedule="cosine"), "unknown schedule 'cosine': choose from adabatch, fixed"),
    (dict(batch_size=0), "batch_size must be at least 1, not 0"),
    (dict(batch_size=-16), "batch_size must be at least 1, not -16"),
    (dict(batch_size=2048, max_batch_size=4096), "batch size 2,048 is larger than the training set of 1,437"),
    (dict(batch_size=32, max_batch_size=16), r"max_batch_size \(16\) is below batch_size \(32\)"),
    (dict(batch_size=16, max_batch_size=48), "times a power of growth"),
    (dict(epochs=0), "epochs must be at least 1"),
    (dict(every=-1), "every must be at least 1"),
    (dict(lr=-0.1), "lr must be positive and finite"),
    (dict(seed=-1), "seed must be finite and not negative"),
    (dict(micro_batch=0), "micro_batch must be at least 1"),
    (dict(processes=0), "processes must be at least 1"),
    (dict(device="cuda:7"), "device cuda:7 is unavailable"),
    (dict(precision="fp8"), "unknown precision 'fp8'"),
    (dict(momentum=1.5), "momentum must be below 1"),
    (dict(schedule="fixed", growth=2.0), "a fixed schedule has no growth"),
    (dict(model="resnet50"), "resnet50 does not fit digits: choose from alexnet, resnet20, vgg19bn"),
    (dict(dataset="cifar100", data_dir="nowhere"), "cifar100 is not in nowhere/ and could not be downloaded"),
])
def test_bad_input_is_one_line_and_writes_nothing(options, line, tmp_path, monkeypatch, capsys):
    def download(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr("torchvision.datasets.CIFAR100", download)
    monkeypatch.chdir(tmp_path)
    assert main(settings(options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises((ValueError, TypeError), match=line): run(Experiment(**options))
    assert list(tmp_path.iterdir()) == []

def test_wrong_types_and_unknown_names(capsys):
    for options in (["--epochs", "ten"], ["--epohcs", "3"], ["--drop_last", "maybe"]):
        with pytest.raises(SystemExit): main(options)
        assert "error: " in capsys.readouterr().err
    with pytest.raises(TypeError, match="epochs must be int or None, not 2.5"):
        resolve(Experiment(epochs=2.5))
    with pytest.raises(TypeError, match="drop_last must be bool or None, not 1"):
        resolve(Experiment(drop_last=1))
    with pytest.raises(ValueError, match="unknown parameter 'modle': did you mean 'model'"):
        from_notebook({"modle": 1}, ["# Parameters\nmodle = 1"])
    with pytest.raises(ValueError, match="unknown parameter 'modle'"):
        from_notebook({"modle": 1}, ["# Parameters\n%matplotlib inline\nmodle: int = 1"])

def test_an_output_folder_that_cannot_be_written(tmp_path, quick):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="output folder .* cannot be written"):
        run(Experiment(output_dir=str(tmp_path / "file"), **SHORT))

def test_one_definition(tmp_path):
    e = resolve(
        Experiment(
            model="vgg19_bn", dataset="cifar10", schedule="fixed", drop_last=False, processes=3,
            output_dir=str(tmp_path), device="cpu"))
    parser = experiment.argparse.ArgumentParser()
    experiment.add_options(parser)
    assert resolve(Experiment(**vars(parser.parse_args(arguments(e.experiment))))) == e
    notebook = json.loads(Path("nbs/run.ipynb").read_text())
    (cell,) = ("".join(c["source"]) for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    exec(cell, names := {})
    assert from_notebook(names, [cell]) == Experiment(output_dir="runs")
    assert {n for n in names if n != "__builtins__"} == set(FIELDS)

def test_names_of_arms():
    def name(**options):
        return resolve(Experiment(**dict(model="resnet20", dataset="cifar100", device="cpu") | options)).arm
    assert name() == "adabatch-128-2048" and name(schedule="fixed") == "fixed-128"
    assert name(micro_batch=64) == "adabatch-128-2048-accum64" and name(processes=3) == "adabatch-128-2048-x3"
    assert (
        name(batch_size=1024, max_batch_size=16384, lr=0.1, lr_decay=0.5, warmup_epochs=5)
        == "adabatch-1024-16384-lr0.1-decay0.5-warmup5")
    assert name(epochs=20, every=4) == "adabatch-128-2048-epochs20-every4"

def test_a_run_is_made_once(tmp_path, quick):
    e = Experiment(output_dir=str(tmp_path), **SHORT)
    made = run(e)
    path = resolve(e).path
    before = path.stat().st_mtime_ns
    assert record.differences(made, run(e)) == [] and path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="was made with other settings .momentum 0.9.*overwrite"):
        run(replace(e, momentum=0.5))
    assert record.differences(made, run(replace(e, momentum=0.5, overwrite=True))) != []
    assert record.differences(made, run(replace(e, overwrite=True))) == []  # the same seed, the same run
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged or not a record.*delete it"): run(e)

def test_a_run_that_diverges_is_recorded(tmp_path, quick):
    r = run(Experiment(output_dir=str(tmp_path), lr=1e9, **SHORT))
    assert r.status == "diverged" and r.epochs == 1 and r.summary().startswith("diverged: ")

def interrupted(e, at=(1, 5)):
    "Make a run in this process, and be stopped."
    class Stop(train.Silent):
        def on_update(self, epoch, update, updates):
            if (epoch, update) == at: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted): run(e, Stop())

def test_a_named_checkpoint_is_resumed_with_other_micro_batches(tmp_path, quick):
    e = Experiment(output_dir=str(tmp_path), **SHORT)
    whole = run(replace(e, output_dir=str(tmp_path / "whole")))
    interrupted(e)
    assert status(resolve(e)) == "interrupted in epoch 2 of 2"
    checkpoint = str(resolve(e).path.with_suffix(".pt"))
    with pytest.raises(ValueError, match="was written with other settings .lr"):
        run(replace(e, lr=0.5, resume_from=checkpoint))
    with pytest.raises(FileNotFoundError, match="absent.pt is not there"):
        run(replace(e, micro_batch=7, resume_from=f"{tmp_path}/absent.pt"))
    accumulated = run(replace(e, micro_batch=7, resume_from=checkpoint))
    assert accumulated.micro_batch.tolist() == [16, 0] and not accumulated.as_configured
    pure = run(replace(e, micro_batch=7, overwrite=True))
    assert pure.micro_batch.tolist() == [7, 7] and pure.environment["restarts"] == 0
    assert record.differences(run(e), whole) == []  # the interrupted run itself has lost nothing
    interrupted(replace(e, seed=1))
    with pytest.raises(ValueError, match="was written with other settings .momentum"):
        run(replace(e, seed=1, momentum=0.5))

def test_a_resumed_run_says_what_is_done(tmp_path, quick, capsys):
    e = Experiment(output_dir=str(tmp_path), **SHORT)
    interrupted(e)
    run(e, train.Progress(resolve(e)))
    assert "resumed in epoch 2, from update 6 of " in capsys.readouterr().out

def test_a_notebook_shows_an_interrupt_in_one_line(capsys):
    result = InteractiveShell().run_cell("from adabatch.device import Interrupted\nraise Interrupted('stopped', 2)")
    assert result.error_in_exec and capsys.readouterr().out == "stopped\n"

def test_a_run_that_has_a_checkpoint_goes_on_from_that(tmp_path, quick):
    e = Experiment(output_dir=str(tmp_path), **SHORT)
    interrupted(e, (0, 3))
    other = replace(e, micro_batch=5, resume_from=str(resolve(e).path.with_suffix(".pt")))
    interrupted(other, (1, 9))
    own = resolve(other).path.with_suffix(".pt")
    own.rename(f"{own}.previous")  # killed between the two renames
    assert run(other).environment["restarts"] == 2

def test_the_commit_is_named_where_there_is_no_git(monkeypatch):
    monkeypatch.setattr(train, "HERE", Path("/"))
    monkeypatch.setenv("ADABATCH_COMMIT", "0123abc")
    assert train.commit() == "0123abc"
    monkeypatch.delenv("ADABATCH_COMMIT")
    assert train.commit() == "unknown"

def test_a_run_stopped_after_the_last_update_of_an_epoch_goes_on_and_shows_that_epoch(tmp_path, quick, capsys):
    class Stop(train.Progress):
        def on_update(self, epoch, update, updates):
            if (epoch, update) == (1, updates): signal.raise_signal(signal.SIGTERM)
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    with pytest.raises(Interrupted, match="after 44 updates of epoch 2"): run(e, Stop(e))
    capsys.readouterr()
    found = run(e, train.Progress(e))
    assert capsys.readouterr().out.startswith("epoch   2/")
    assert record.differences(found, run(replace(e.experiment, output_dir=str(tmp_path / "whole")))) == []

def test_a_record_names_every_commit_and_device_it_was_made_with(tmp_path, quick, monkeypatch):
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    makers = iter([("a GPU", "first"), ("a CPU", "second"), ("a CPU", "second")])
    monkeypatch.setattr(train, "origin", lambda device: dict(zip(("device", "commit"), next(makers))))
    class Stop(train.Silent):
        def on_update(self, epoch, update, updates):
            if (epoch, update) in ((0, 5), (1, 5)) and (epoch, update) not in seen:
                seen.append((epoch, update))
                signal.raise_signal(signal.SIGTERM)
    seen = []
    for _ in range(2):
        with pytest.raises(Interrupted): run(e, Stop())
    made = run(e).environment
    assert (made["device"], made["commit"], made["restarts"]) == ("a GPU; a CPU", "first; second", 2)

def test_a_compiled_run_is_not_carried_on_uncompiled(tmp_path):
    plain = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    compiled = resolve(replace(plain.experiment, compile=True))
    assert train.identity(plain) != train.identity(compiled)

@pytest.mark.parametrize("error", [WrongValue("no"), WrongType("no"), FileNotFoundError("no"), MemoryError("no")])
def test_a_command_says_in_one_line_what_is_wrong(error, capsys):
    def command(): raise error
    assert experiment.exit_code(command) == 2 and capsys.readouterr().err == "error: no\n"

@pytest.mark.parametrize("defect", [lambda: 1 - None, lambda: int("one"), lambda: {}["no"]])
def test_a_defect_keeps_its_traceback(defect):
    with pytest.raises((TypeError, ValueError, KeyError)): experiment.exit_code(defect)

def test_every_complaint_is_marked():
    for path in Path("adabatch").glob("*.py"):
        assert not re.findall(r"raise (?:Value|Type)Error\b", path.read_text()), path

def test_numbers_that_papermill_makes_of_text_are_text_again():
    names = dict(milestones=60, output_dir=2024, epochs=5)
    e = from_notebook(names, ["# Parameters\nmilestones = 60"])
    assert (e.milestones, e.output_dir, e.epochs) == ("60", "2024", 5)
    command = sweep.command(resolve(replace(e, epochs=100, device="cpu")), "papermill")
    assert command[command.index("milestones") - 1] == "-r" and command[command.index("epochs") - 1] == "-p"

@pytest.mark.parametrize("seeds", [1, 3])
def test_no_run_stands_twice_in_a_grid(seeds):
    for grid in experiment.GRIDS:
        runs = select(grid, seeds=seeds, device="cpu")
        assert len({r.path for r in runs}) == len(runs)
    assert len(select("paper", batch_size=128, device="cpu")) == 23

def test_what_is_shown_in_a_pipe(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    progress = train.Progress(resolve(Experiment(device="cpu")))
    row = dict(batch_size=16, lr=0.02, train_loss=1, test_error=50, train_seconds=3000, test_seconds=600)
    for update in range(1, 91):
        clock[0] += 2
        progress.on_update(1, update, 90)
    progress.on_epoch(1, row)
    for update in range(1, 91): progress.on_update(9, update, 90)
    progress.on_epoch(9, row)
    resumed, *lines = capsys.readouterr().out.splitlines()
    assert resumed == "resumed in epoch 2, from update 1 of 90"
    minutes = [line.split()[-1] for line in lines[:3]]
    assert minutes == ["30/90", "60/90", "90/90"] and len(lines) == 5
    assert lines[3].endswith("50.00 %  8:00:00 left") and lines[4].endswith("50.00 %  3600.0 s")

def test_a_sweep_writes_among_the_evidence_though_the_notebook_does_not():
    command = sweep.command(resolve(Experiment(device="cpu")), "papermill")
    assert command[-3:] == ["-r", "output_dir", "outputs"]

def test_the_line_of_an_epoch_fits_a_terminal():
    row = dict(batch_size=16384, lr=0.00316, train_loss=2.3019, test_error=80.28, train_seconds=0, test_seconds=0)
    assert len(record.epoch_line(99, 100, row, "8:00:00 left")) == 79

def test_an_unknown_option_is_answered_with_the_nearest(capsys):
    for command, option, advice in (
        (main, ["--bach_size", "3"], "unknown option --bach_size: did you mean --batch_size?"),
        (main, ["--dry-run"], "unknown option --dry-run: did you mean --dry_run?"),
        (sweep.main, ["--sedes=3"], "unknown option --sedes=3: did you mean --seeds?"),
        (main, ["alexnet"], "unknown option alexnet\n"),
    ):
        with pytest.raises(SystemExit, match="2"): command(option)
        assert advice in capsys.readouterr().err

def test_a_dry_run_of_one_experiment(tmp_path, quick, capsys):
    options = [f"--{n}={v}" for n, v in SHORT.items()] + [f"--output_dir={tmp_path}"]
    assert main([*options, "--dry_run"]) == 0 and not list(tmp_path.rglob("*.npz"))
    out = capsys.readouterr().out
    assert "<Plan: " in out and out.endswith("seed0.npz: to do\n")
    assert main(options) == 0 and main([*options, "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith("seed0.npz: exists\n")

def test_a_sweep_that_cannot_be_names_the_arm_or_the_grid_that_has_it():
    with pytest.raises(ValueError, match="the grid paper has no arm of digits: --grid digits has"):
        select("paper", dataset="digits")
    with pytest.raises(ValueError, match="the grid digits has no arm of resnet50 on fake: no other has, either"):
        select("digits", dataset="fake", model="resnet50")
    with pytest.raises(ValueError, match="adabatch of vgg19bn on digits, grid digits: .* the nearest are 192 and 384"):
        select("digits", batch_size=3, device="cpu")

def test_a_notebook_redraws_one_picture_also_when_resumed(tmp_path, quick, capsys, monkeypatch):
    shown, updated = [], []
    def display(figure, display_id):
        shown.append(figure)
        return SimpleNamespace(update=updated.append)
    monkeypatch.setattr("IPython.display.display", display)
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT | dict(epochs=4)))
    interrupted(e, (2, 5))
    run(e, train.LivePlot(e))
    assert capsys.readouterr().out == "resumed in epoch 3, from update 6 of 44\n"
    drawn = [[len(ax.lines[0].get_xdata()) for ax in figure.axes[:2]] for figure in shown + updated]
    assert len(shown) == 1 and drawn == [[2, 2], [3, 3], [4, 4]]

def test_help_names_the_values_of_the_recipes(capsys):
    with pytest.raises(SystemExit): main(["--help"])
    out = capsys.readouterr().out
    for (data, model), values in experiment.RECIPES.items():
        (line,) = (line.split() for line in out.splitlines() if line.split()[:2] == [data, model])
        assert line[2:] == [
            str(values[n]) for n in ("batch_size", "max_batch_size", "epochs", "every", "lr", "decay", "weight_decay")]

def hold(path):
    with lock(path):
        Path(f"{path}.held").touch()
        time.sleep(60)

def test_two_processes_never_make_the_same_run(tmp_path, quick, capsys):
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    holder = start(hold, str(e.path))
    while not Path(f"{e.path}.held").exists():
        assert holder.is_alive()
        time.sleep(0.01)
    assert status(e) == "running"
    with pytest.raises(Busy, match="is being written by another process"): run(e)
    sweep = Sweep([e], "process")
    assert sweep.run() == [] and "left to the process that is making it" in capsys.readouterr().out
    holder.kill()
    holder.join()
    assert status(e) == "to do" and run(e).epochs == 2

def test_the_paper_grid_is_what_the_paper_and_the_t4_reproduction_ran(capsys):
    assert sweep.main("--dry_run --executor process --device cpu".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = {line.split()[0].removeprefix("outputs/").removesuffix("-seed0.npz") for line in lines[:-1]}
    small_and_large = {"vgg19bn": (128, 2048), "resnet20": (128, 2048), "alexnet": (256, 4096)}
    expected = {
        f"{d}/{m}/{a}" for d in ("cifar10", "cifar100") for m, (s, l) in small_and_large.items()
        for a in (f"fixed-{s}", f"fixed-{l}", f"adabatch-{s}-{l}")}
    expected |= {f"cifar100/{m}/adabatch-{s}-{l}-accum64" for m, (s, l) in small_and_large.items()}
    expected |= {
        f"cifar100/{m}/{a}" for m in ("vgg19bn", "resnet20")
        for a in (
            "fixed-128-lr0.1-decay0.25-x4", "adabatch-128-2048-lr0.1-decay0.5-x4",
            "adabatch-1024-16384-lr0.1-decay0.5-warmup5-x4", "fixed-2048-warmup5")}
    assert runs == expected and lines[-1].startswith("29 runs")
    assert len(select("paper", seeds=5, dataset="cifar100", device="cpu")) == 5 * 20
    for option in ("--seeds", "--jobs"):
        assert (
            sweep.main(["--grid", "digits", option, "0"]) == 2
            and f"{option[2:]} must be at least 1, not 0" in capsys.readouterr().err)

def test_a_sweep_goes_on_after_a_failure_and_makes_only_what_is_left(tmp_path, capsys):
    good, bad = ([e] for e in (
        Experiment("alexnet", seed=1, output_dir=str(tmp_path), **SHORT),
        Experiment("alexnet", batch_size=1500, max_batch_size=1500, output_dir=str(tmp_path), device="cpu")))
    runs = [resolve(e) for e in bad + good]
    sweep = Sweep(runs, "process")
    assert sweep.table().endswith("2 runs, 2 left to do")
    assert ", about " not in sweep.table()  # no record says how long a run takes
    assert sweep.run() == [runs[0].path]
    out = capsys.readouterr().out
    assert "FAILED" in out and "batch size 1,500 is larger" in out and "[2/2]" in out and "complete: test error" in out
    table = Sweep(runs, "process").table().splitlines()
    seconds = record.load(runs[1].path).seconds_per_sample * 1437 * 10  # of ten epochs
    assert table[0].endswith(f"to do, about {duration(seconds)} in all") and table[1].endswith("complete")
    other = resolve(replace(bad[0], micro_batch=64))
    assert ", about " not in Sweep([other], "process").table()  # its updates are divided in another way
    assert table[2] == "2 runs, 1 left to do"

def test_papermill_refuses_unknown_parameters_and_makes_the_record(tmp_path):
    def execute(*parameters):
        command = [*papermill(tmp_path), "-p", "epochs", "2", "-p", "every", "1", *parameters]
        return subprocess.run(command, capture_output=True, text=True)
    wrong = execute("-p", "epohcs", "3")
    assert wrong.returncode and "unknown parameter 'epohcs': did you mean 'epochs'?" in wrong.stderr
    assert not (tmp_path / "digits").exists()
    assert execute("-p", "max_batch_size", "32").returncode == 0
    assert record.load(tmp_path / "digits/alexnet/adabatch-16-32-epochs2-every1-seed0.npz").epochs == 2
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    output = json.dumps([c.get("outputs") for c in cells])
    assert (
        output.count("image/png") == 3 and "complete: test error" in output
        and not any(o.get("name") == "stderr" for c in cells for o in c.get("outputs", [])))
    assert "record exists and is loaded" not in output
    assert (
        execute("-p", "max_batch_size", "32").returncode == 0
        and "record exists and is loaded" in (tmp_path / "out.ipynb").read_text())

def test_real_alexnet_learns_and_is_reproduced_exactly(cifar10, tmp_path, monkeypatch):
    "One epoch in small on real images: a slice of the training set, so that it takes seconds."
    whole = train.load_data
    def slice_of(*args):
        data = whole(*args)
        data.crops, data.train_size, data.test, data.test_size = (
            data.crops[::10], 5000, [t[::10] for t in data.test], 1000)
        data.labels = data.labels[::10]
        return data
    monkeypatch.setattr(train, "load_data", slice_of)
    e = Experiment(
        dataset="cifar10", data_dir=cifar10, batch_size=64, max_batch_size=128, lr=0.02, epochs=4, every=2, device="cpu"
    )
    first, second = (run(replace(e, output_dir=str(tmp_path / k))) for k in "ab")
    assert record.differences(first, second) == []
    assert first.test_error[-1] < 80 and first.train_loss[-1] < first.train_loss[0] - 0.2
