"A sweep whose runs are jobs of a cluster."

import os, signal, sys
from dataclasses import replace

import pytest
import torch
from conftest import wait_for
from test_crash import children

from adabatch import record, sweep, train
from adabatch.experiment import Experiment, resolve
from adabatch.sweep import Cluster, status
from adabatch.train import checkpoint_path

SETTINGS = dict(epochs=2, every=1, batch_size=64, max_batch_size=128, device="cpu", save_weights=False)

def descendants(pid):
    "The process ids of children and their children."
    return [p for child in children(pid) for p in (child, *descendants(child))]

def test_a_preempted_job_is_resubmitted_and_makes_the_record_of_one_left_alone(tmp_path):
    settings = SETTINGS | dict(checkpoint_minutes=0.01, output_dir=str(tmp_path / "jobs"))
    run = resolve(Experiment(**settings))
    cluster = Cluster([run], kind="local", gpus=0)
    (job,) = cluster.run()
    wait_for(checkpoint_path(run).exists)
    assert status(run) == "running"
    for pid in descendants(int(job.job_id)): os.kill(pid, signal.SIGUSR2)  # as Slurm does: every process of the job
    wait_for(job.done, seconds=240)
    assert "Requeued job" in job.stdout() and "this job is preempted" in job.stderr()
    assert "stopped by SIGTERM" in job.stdout()  # with a checkpoint of that moment: SIGUSR2 did not kill the training
    whole, found = train.run(replace(run.experiment, output_dir=str(tmp_path / "whole"))), record.load(run.path)
    assert "complete" in job.result() and record.differences(whole, found) == [] and found.environment["restarts"] == 1
    assert cluster.run() == []  # nothing is left to submit

SBATCH = '#!/bin/sh\ncp "$1" {0}/submitted.sh\necho Submitted batch job 12\n'
SACCT = '#!/bin/sh\nprintf "JobID|State|NodeList\\n12|PENDING|none\\n"\n'

def test_the_command_submits_once_and_shows_the_queue(tmp_path, monkeypatch, capsys):
    for name, text in dict(sbatch=SBATCH.format(tmp_path), sacct=SACCT, srun="#!/bin/sh\n").items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runs = [resolve(Experiment(device="cpu", output_dir=str(tmp_path / "out")))]
    monkeypatch.setattr(sweep, "select", lambda *a, **k: runs)
    options = ["--executor", "slurm", "--partition", "night", "--gpus", "1", "--hours", "2"]
    assert sweep.main([*options, "--dry_run"]) == 0 and "to do\n" in capsys.readouterr().out
    assert sweep.main(options) == 0 and "1 of 1 runs were submitted" in capsys.readouterr().out
    script = (tmp_path / "submitted.sh").read_text()
    for line in ("--partition=night", "--gpus-per-node=1", "--time=120", "--signal=USR2@90"):
        assert f"#SBATCH {line}\n" in script
    assert sweep.main([*options, "--dry_run"]) == 0 and "to do, job 12 PENDING" in capsys.readouterr().out
    assert sweep.main(options) == 0 and "0 of 1 runs were submitted" in capsys.readouterr().out

def test_without_submitit_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert sweep.main(["--executor", "slurm", "--grid", "digits", "--device", "cpu"]) == 2
    assert "pip install submitit" in capsys.readouterr().err

def test_the_node_chooses_the_device_when_gpus_are_asked_for(tmp_path):
    run = resolve(Experiment(device="cpu", output_dir=str(tmp_path)))
    kept = []
    class Executor:
        def __init__(self, *args, **kwargs): pass
        def update_parameters(self, **kwargs): kept.append(kwargs)
        submit = staticmethod(kept.append)
    for gpus in (None, 0):
        cluster = Cluster([run], gpus=gpus)
        cluster.submitit = type("", (), dict(AutoExecutor=Executor))
        cluster.submit(run)
    assert [job.run.experiment.device for job in kept[1::2]] == [None, "cpu"]
    assert [parameters["gpus_per_node"] for parameters in kept[::2]] == [1, 0]

def test_the_login_node_need_not_be_able_to_run_what_it_submits(tmp_path, monkeypatch):
    e = Experiment(precision="bf16", device="cuda:99", workers=8 * os.cpu_count() + 1, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="cuda:99 is unavailable"): resolve(e)
    assert resolve(e, here=False).experiment.device == "cuda:99"
    with pytest.raises(ValueError, match="workers must be at most"): resolve(replace(e, device="cpu", precision=None))
    submitted = []
    monkeypatch.setattr(sweep, "_on_cluster", lambda runs, options: submitted.extend(runs))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert sweep.main(["--executor", "slurm", "--grid", "digits", "--precision", "bf16"]) == 0
    assert {run.experiment.precision for run in submitted} == {"bf16"}
    assert sweep.main(["--executor", "process", "--grid", "digits", "--precision", "bf16", "--device", "cpu"]) == 2
