import json, os, re, signal, subprocess, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell
from conftest import at_update, flags, papermill, start, wait_for

from adabatch import WrongType, WrongValue, experiment, record, sweep, train
from adabatch.device import Interrupted
from adabatch.experiment import FIELDS, Experiment, arguments, from_notebook, resolve, select
from adabatch.files import Busy, lock
from adabatch.sweep import Sweep, status
from adabatch.train import duration, main, run

SHORT = dict(epochs=2, every=1, max_batch_size=32, device="cpu", save_weights=False)

def test_one_definition(tmp_path):
    settings = dict(drop_last=False, processes=3, output_dir=str(tmp_path), device="cpu")
    e = resolve(Experiment("vgg19_bn", "cifar10", "fixed", **settings))
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
    large = dict(batch_size=1024, max_batch_size=16384, lr=0.1, lr_decay=0.5, warmup_epochs=5)
    assert name(**large) == "adabatch-1024-16384-lr0.1-decay0.5-warmup5"
    assert name(epochs=20, every=4) == "adabatch-128-2048-epochs20-every4"

def test_a_run_is_made_once(tmp_path, quick, capsys):
    e = Experiment(output_dir=str(tmp_path), **SHORT)
    made = run(e)
    path = resolve(e).path
    before = path.stat().st_mtime_ns
    assert record.differences(made, run(e, train.Progress(resolve(e)))) == [] and path.stat().st_mtime_ns == before
    assert "record exists and is loaded" in capsys.readouterr().out
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

def stop(): signal.raise_signal(signal.SIGTERM)

def interrupted(e, at=(1, 5)):
    "Make a run in this process, and be stopped."
    with pytest.raises(Interrupted): run(e, at_update(at, stop)())

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

def test_an_interrupted_overwrite_is_not_lost(tmp_path, quick):
    e = Experiment(output_dir=str(tmp_path), **SHORT | dict(save_weights=True))
    made, again = run(e), replace(e, overwrite=True, save_weights=False)
    path = resolve(e).path
    interrupted(again)
    assert record.differences(run(e), made) == [] and path.with_suffix(".pt").exists()  # the old record stands
    assert run(again).environment["restarts"] == 1
    assert not path.with_suffix(".pt").exists() and not path.with_suffix(".weights.pt").exists()

class StopsAtTheEnd(train.Silent):
    def on_epoch(self, epoch, row):
        if epoch == 1: stop()

def test_a_signal_during_the_last_test_ends_the_process_but_leaves_the_record(tmp_path, quick):
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    with pytest.raises(Interrupted): run(e, StopsAtTheEnd())
    assert train.existing(e).status == "complete" and not e.path.with_suffix(".pt").exists()

def test_overwriting_trains_again_though_the_finished_checkpoint_was_left(tmp_path, quick, monkeypatch):
    e, updates = Experiment(output_dir=str(tmp_path), **SHORT), []
    with monkeypatch.context() as killed:
        killed.setattr(train, "remove_checkpoint", lambda path: None)
        run(e)
    assert resolve(e).path.with_suffix(".pt").exists()
    run(replace(e, overwrite=True), at_update((0, 1), lambda: updates.append(1))())
    assert updates

class Launched:
    "A process whose output is interrupted twice, `apart` seconds from one another, and then ends."
    def __init__(self, apart):
        self.outputs, self.stdin, self.done = iter((0, apart, None)), self, []
        self.send_signal, self.close = self.done.append, lambda: self.done.append("closed")

    @property
    def stdout(self):
        if (wait := next(self.outputs)) is None: return iter(())
        time.sleep(wait)
        raise KeyboardInterrupt

def test_one_ctrl_c_that_arrives_twice_is_one_request():
    for apart, done in ((0.1, [signal.SIGINT]), (1.2, [signal.SIGINT, "closed"])):
        child = Launched(apart)
        assert train._pass_on(child) == ([], signal.SIGINT) and child.done == done

def test_a_checkpoint_older_than_its_record_is_removed(tmp_path, quick):
    e = Experiment(output_dir=str(tmp_path), **SHORT)
    interrupted(e)
    left = resolve(e).path.with_suffix(".pt").read_bytes()
    run(e)
    resolve(e).path.with_suffix(".pt").write_bytes(left)
    os.utime(resolve(e).path.with_suffix(".pt"), (0, 0))
    run(e)
    assert not resolve(e).path.with_suffix(".pt").exists()

def test_a_record_of_a_device_that_is_not_here_is_loaded(tmp_path, quick):
    e = Experiment(output_dir=str(tmp_path), precision="tf32", compile=True, **SHORT)
    with pytest.raises(ValueError, match="tf32 is a precision of NVIDIA GPUs"): run(e)
    made = run(replace(e, precision="fp32", compile=False))
    record.save(resolve(e, here=False).path, [dict(zip(made.arrays, row)) for row in zip(*made.arrays.values())],
                made.config | dict(precision="tf32"), made.environment, "complete")
    assert run(e).config["precision"] == "tf32"
    with pytest.raises(ValueError, match="tf32 is a precision of NVIDIA GPUs"): run(replace(e, overwrite=True))

def test_the_commit_is_named_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("ADABATCH_COMMIT", "0123abc")  # over a repository that holds another
    assert train.commit() == "0123abc"
    monkeypatch.setattr(train, "HERE", Path("/"))
    monkeypatch.delenv("ADABATCH_COMMIT")
    assert train.commit() == "unknown"

def test_a_run_stopped_after_the_last_update_of_an_epoch_goes_on_and_shows_that_epoch(tmp_path, quick, capsys):
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    with pytest.raises(Interrupted, match="after 44 updates of epoch 2"):
        run(e, at_update((1, 44), stop, train.Progress)(e))
    capsys.readouterr()
    found = run(e, train.Progress(e))
    assert capsys.readouterr().out.startswith("epoch   2/")
    assert record.differences(found, run(replace(e.experiment, output_dir=str(tmp_path / "whole")))) == []

def test_a_record_names_every_commit_and_device_it_was_made_with(tmp_path, quick, monkeypatch):
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    makers = iter([("a GPU", "first"), ("a CPU", "second"), ("a CPU", "second")])
    monkeypatch.setattr(train, "origin", lambda device: dict(zip(("device", "commit"), next(makers))))
    for moment in ((0, 5), (1, 5)): interrupted(e, moment)
    made = run(e).environment
    assert (made["device"], made["commit"], made["restarts"]) == ("a GPU; a CPU", "first; second", 2)

def test_a_compiled_run_is_not_carried_on_uncompiled(tmp_path):
    plain = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    compiled = resolve(replace(plain.experiment, compile=True))
    assert train.identity(plain) != train.identity(compiled)

def test_a_command_says_in_one_line_what_is_wrong_but_a_defect_keeps_its_traceback(capsys):
    def command(error): raise error
    for error in (WrongValue("no"), WrongType("no"), FileNotFoundError("no"), MemoryError("no")):
        assert experiment.exit_code(lambda error=error: command(error)) == 2
        assert capsys.readouterr().err == "error: no\n"
    for defect in (lambda: 1 - None, lambda: int("one"), lambda: {}["no"]):
        with pytest.raises((TypeError, ValueError, KeyError)): experiment.exit_code(defect)

def test_every_complaint_is_marked_and_no_clock_is_read_that_can_be_set_back():
    for path in Path("adabatch").glob("*.py"):
        assert not re.findall(r"raise (?:Value|Type)Error\b|\btime\.time\(|datetime\.now", path.read_text()), path

@pytest.mark.filterwarnings("ignore:the batch ends at 32")
def test_numbers_that_papermill_makes_of_text_are_text_again():
    names = dict(milestones=60, output_dir=2024, epochs=5)
    e = from_notebook(names, ["# Parameters\nmilestones = 60"])
    assert (e.milestones, e.output_dir, e.epochs) == ("60", "2024", 5)
    command = sweep.command(resolve(replace(e, epochs=100, device="cpu")), "papermill")
    assert command[command.index("milestones") - 1] == "-r" and command[command.index("epochs") - 1] == "-p"

@pytest.mark.filterwarnings("ignore:the batch ends at 2048")
@pytest.mark.filterwarnings("ignore:the warm-up does not rise")
def test_no_run_stands_twice_in_a_grid():
    for grid in experiment.GRIDS:
        runs = select(grid, seeds=3, device="cpu")
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
        (main, "--dry-run", "unknown option --dry-run: did you mean --dry_run?"),
        (sweep.main, "--sedes=3", "unknown option --sedes=3: did you mean --seeds?"),
        (sweep.main, "--seed=3", "unknown option --seed=3: did you mean --seeds?"),  # no abbreviation
        (main, "alexnet", "unknown option alexnet\n"),
    ):
        with pytest.raises(SystemExit, match="2"): command([option])
        assert advice in capsys.readouterr().err

def test_a_dry_run_of_one_experiment(tmp_path, quick, capsys):
    options = flags(output_dir=tmp_path, **SHORT)
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
    def display(figure, display_id): return shown.append(figure) or SimpleNamespace(update=updated.append)
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
    names = "batch_size", "max_batch_size", "epochs", "every", "lr", "decay", "weight_decay"
    for (data, model), values in experiment.RECIPES.items():
        (line,) = (line.split() for line in out.splitlines() if line.split()[:2] == [data, model])
        assert line[2:] == [str(values[name]) for name in names]

def hold(path):
    with lock(path):
        Path(f"{path}.held").touch()
        time.sleep(60)

def test_two_processes_never_make_the_same_run(tmp_path, quick, capsys):
    e = resolve(Experiment(output_dir=str(tmp_path), **SHORT))
    holder = start(hold, str(e.path))
    wait_for(Path(f"{e.path}.held").exists, holder.is_alive)
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
    several = "fixed-128-lr0.1-decay0.25-x4", "adabatch-128-2048-lr0.1-decay0.5-x4"
    several += "adabatch-1024-16384-lr0.1-decay0.5-warmup5-x4", "fixed-2048-warmup5"
    expected |= {f"cifar100/{m}/{a}" for m in ("vgg19bn", "resnet20") for a in several}
    assert runs == expected and lines[-1].startswith("29 runs")
    assert len(select("paper", seeds=5, dataset="cifar100", device="cpu")) == 5 * 20
    for option in ("--seeds", "--jobs"):
        assert sweep.main(["--grid", "digits", option, "0"]) == 2
        assert f"{option[2:]} must be at least 1, not 0" in capsys.readouterr().err

def test_a_sweep_goes_on_after_a_failure_and_makes_only_what_is_left(tmp_path, capsys):
    large = dict(batch_size=1500, max_batch_size=1500, output_dir=str(tmp_path), device="cpu")
    short = SHORT | dict(batch_size=128, max_batch_size=256, output_dir=str(tmp_path))  # few updates, soon made
    runs = [resolve(Experiment(**large)), resolve(Experiment(seed=1, **short))]
    sweep = Sweep(runs, "process")
    assert sweep.table().endswith("2 runs, 2 left to do")
    assert ", about " not in sweep.table()  # no record says how long a run takes
    assert sweep.run() == [runs[0].path]
    out = capsys.readouterr().out
    assert "FAILED" in out and "batch size 1,500 is larger" in out and "[2/2]" in out and "complete: test error" in out
    table = Sweep(runs, "process").table().splitlines()
    seconds = record.load(runs[1].path).seconds_per_sample * 1437 * 10  # of ten epochs
    assert table[0].endswith(f"to do, about {duration(seconds)} in all") and table[1].endswith("complete")
    other = resolve(Experiment(**large, micro_batch=64))
    assert ", about " not in Sweep([other], "process").table()  # its updates are divided in another way
    assert table[2] == "2 runs, 1 left to do"

def test_papermill_refuses_unknown_parameters_and_makes_the_record(tmp_path):
    def execute(*parameters):
        command = [*papermill(tmp_path), "-p", "epochs", "2", "-p", "every", "1", *parameters]
        return subprocess.run(command, capture_output=True, text=True)
    wrong = execute("-p", "epohcs", "3")
    assert wrong.returncode and "unknown parameter 'epohcs': did you mean 'epochs'?" in wrong.stderr
    assert not (tmp_path / "digits").exists()
    assert execute("-p", "batch_size", "256", "-p", "max_batch_size", "512").returncode == 0
    assert record.load(tmp_path / "digits/alexnet/adabatch-256-512-epochs2-every1-seed0.npz").epochs == 2
    outputs = [o for cell in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    text = json.dumps(outputs)
    assert text.count("image/png") == 3 and "complete: test error" in text
    assert "record exists and is loaded" not in text and not any(o.get("name") == "stderr" for o in outputs)

def test_real_alexnet_learns(cifar10, tmp_path, monkeypatch):
    "Four epochs in small on real images: a slice of the training set, so that it takes seconds."
    whole = train.load_data
    def slice_of(*args):
        data = whole(*args)
        data.crops, data.train_size = data.crops[::50], 1000
        data.test, data.test_size = [t[::50] for t in data.test], 200
        data.labels = data.labels[::50]
        return data
    monkeypatch.setattr(train, "load_data", slice_of)
    settings = dict(batch_size=16, max_batch_size=32, lr=0.02, epochs=4, every=2, device="cpu")
    e = Experiment(dataset="cifar10", data_dir=cifar10, **settings)
    made = run(replace(e, output_dir=str(tmp_path)))
    assert made.test_error[-1] < 80 and made.train_loss[-1] < made.train_loss[0] - 0.2
