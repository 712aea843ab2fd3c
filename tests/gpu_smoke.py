"""What only a GPU can show, tried in a few minutes: python tests/gpu_smoke.py [--minutes 9] [--device cuda].

Every step rests on those before: the environment; ten updates in which a wait for the device is an error; the check in
each precision; the clock; memory; interruption; throughput, and from it the runs that fit into the minutes; two
processes on one GPU; last, the compiler. A step that fails is named, and the next one begins. With --rehearse the same
steps run on whatever device there is, with small batches.
"""
import argparse, contextlib, functools, math, os, platform, signal, subprocess, sys, tempfile, time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from adabatch import record
from adabatch.data import load_data
from adabatch.device import PRECISIONS, Interrupted, best_device, check_device, device_settings, synchronize
from adabatch.experiment import NETWORKS, Experiment, Run, exit_code, recipe, resolve
from adabatch.gpu import (
    Question, by_priority, change, compile_question, distance, exact_questions, precision_question, short)
from adabatch.train import commit, device_name, environment, make_trainer
from adabatch.trainer import Trainer, prepare

def _describe(device):
    "What the machine is."
    where = torch.device(device)
    memory = f", {torch.cuda.get_device_properties(where).total_memory / 2**30:.0f} GiB" if where.type == "cuda" else ""
    return (f"{device_name(where)}{memory}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
            f"python {platform.python_version()}, commit {commit()}")

@functools.cache
def _noise(device): return load_data("fake", device=device)

def _one_stage(model, device, batch_size, updates, precision="fp32"):
    "A trainer of one epoch with `updates` updates on random images."
    e = Experiment(model, "fake", "fixed", batch_size, epochs=1, every=1, device=device, precision=precision)
    data = _noise(device)
    if batch_size * updates > len(data.labels): raise ValueError(f"the noise is {data.train_size:,} samples")
    data.train_size, data.test_size = batch_size * updates, 50  # shared by all steps
    return make_trainer(resolve(e, here=False), data)

def _epoch_seconds(trainer) -> tuple[float, list[float]]:
    "Seconds of one epoch by a synchronised clock, and the trainer's own: of its phases, and of everything."
    with device_settings(trainer.device, trainer.precision):
        prepare(trainer)
        begin = time.perf_counter()
        trainer.train_epoch(lambda updates: None)
        synchronize(trainer.device)
        return time.perf_counter() - begin, trainer.state.sums.seconds

def ten_updates(device: str) -> str:
    "Ten updates in which any host synchronisation raises RuntimeError."
    trainer = _one_stage("resnet20", device, 64, 10)
    strict = trainer.device.type == "cuda"
    def watch(on):
        if strict: torch.cuda.set_sync_debug_mode("error" if on else "default")
    update, make = trainer.step.update, []
    def watched(*args):
        make.append(1)
        watch(len(make) > 1)  # lazy initialisation may synchronise
        try: update(*args)
        finally: watch(False)
    trainer.step.update = watched
    trainer.fit()
    return f"{len(make)} updates, {'none waited' if strict else 'waiting is not watched on this device'}"

def clock_agrees(device: str) -> str:
    "Does the trainer's clock agree with a synchronised one? RuntimeError if they differ by 5 %."
    whole, (*phases, own) = _epoch_seconds(_one_stage("alexnet", device, 64, 20))
    found = f"synchronised {whole:.3f} s, the trainer's {own:.3f} s, its phases {sum(phases):.3f} s"
    if abs(own / whole - 1) > 0.05 or abs(sum(phases) / whole - 1) > 0.05: raise RuntimeError(found)
    return found

@contextlib.contextmanager
def limited_memory(trainer: Trainer, samples: int) -> Iterator[None]:
    "Make a forward and backward pass over more than about `samples` samples run out of memory."
    def refuse(module, args):
        if module.training and len(args[0]) > samples: raise torch.OutOfMemoryError("more than the rehearsal allows")
    device = trainer.device
    if device.type != "cuda":
        trainer.micro_batch.tries_memory = True
        with trainer.model.register_forward_pre_hook(refuse): yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with device_settings(device, trainer.precision): trainer.micro_batch.find(samples, None)
    trainer.micro_batch.sizes.clear()
    needed = 1.2 * torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(needed / torch.cuda.get_device_properties(device).total_memory, device)
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.0, device)

def memory_limit(device: str) -> str:
    "A batch that does not fit is halved, recorded as such, and halved again on resume."
    run = resolve(Experiment("resnet20", "digits", "fixed", 512, epochs=2, every=1, device=str(device)))
    data = load_data("digits", device=device)
    data.train_size, data.test_size = 512, 50
    def stop(epoch, row): signal.raise_signal(signal.SIGTERM)
    with tempfile.TemporaryDirectory() as tmp:
        for on_epoch in (stop, lambda epoch, row: None):
            trainer = make_trainer(run, data)
            with limited_memory(trainer, 256), contextlib.suppress(Interrupted):
                trainer.fit(f"{tmp}/run.pt", on_epoch=on_epoch)
        record.save(f"{tmp}/run.npz", trainer.history, run.config, environment(trainer), "complete")
        made = record.load(f"{tmp}/run.npz")
    found = f"micro-batches {made.micro_batch.tolist()}, {made.environment['restarts']} restart"
    halved = made.epochs == 2 and 0 < made.micro_batch.max() < 512 and made.environment["restarts"] == 1
    if not halved: raise RuntimeError(found)
    return found

def _command(device, output_dir):
    settings = dict(model="alexnet", batch_size=32, max_batch_size=64, every=1, epochs=4, device=device,
                    output_dir=output_dir, save_weights=False)
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-u", "-m", "adabatch.train", *options]

def _record(folder): return record.load(next(Path(folder).rglob("*.npz")))

def interrupted_command(device: str) -> str:
    "The command, stopped by SIGTERM after an epoch and repeated, makes the record of an undisturbed run."
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(_command(device, f"{tmp}/whole"), check=True, stdout=subprocess.DEVNULL)
        child = subprocess.Popen(_command(device, f"{tmp}/cut"), text=True, stdout=subprocess.PIPE)
        next(line for line in child.stdout if line.startswith("epoch"))
        child.terminate()
        child.communicate()
        if child.returncode != 128 + signal.SIGTERM: raise RuntimeError(f"exit code {child.returncode} after SIGTERM")
        subprocess.run(_command(device, f"{tmp}/cut"), check=True, stdout=subprocess.DEVNULL)
        whole, cut = _record(f"{tmp}/whole"), _record(f"{tmp}/cut")
    apart = abs(cut.train_loss[-1] / whole.train_loss[-1] - 1)
    found = f"{cut.environment['restarts']} restart, last training loss {apart:.1e} apart"
    same = not record.differences(whole, cut) if device == "cpu" else apart < 0.02  # a GPU's summation order varies
    if cut.environment["restarts"] != 1 or not same: raise RuntimeError(found)
    return found

def throughput(device: str, precision: str, rehearse: bool) -> dict[tuple[str, int], float]:
    "Seconds per training sample of (network, batch size), at both ends of the paper's batch sizes."
    found = {}
    for model in NETWORKS:
        values = recipe(model, "cifar10", "adabatch")
        for size in (values["batch_size"], values["max_batch_size"]):
            measured, updates = (max(2, size // 128), 2) if rehearse else (size, max(1, 5120 // size))
            trainer = _one_stage(model, device, measured, updates, precision)
            _epoch_seconds(trainer)
            trainer.state.update = 0  # again, warm
            found[model, size] = _epoch_seconds(trainer)[0] / (measured * updates)
    return found

def seconds_of(run: Run, seconds_per_sample: dict[tuple[str, int], float]) -> float:
    "How long a run will take; testing a sample costs a third of training on it."
    e, total = run.experiment, 0.0
    (low, slow), (high, fast) = sorted((size, s) for (model, size), s in seconds_per_sample.items() if model == e.model)
    for epoch in range(run.schedule.epochs):
        size = min(run.schedule.at(epoch).batch_size, e.micro_batch or math.inf)
        share = min(1.0, max(0.0, math.log(size / low) / math.log(high / low)))
        total += (50_000 + 10_000 / 3) * (slow + share * (fast - slow))
    return total

def that_fit(runs: list[Run], seconds: float, seconds_per_sample: dict[tuple[str, int], float]) -> list[Run]:
    "The runs, in order, that fit into the time."
    chosen = []
    for run in runs:
        needed = seconds_of(run, seconds_per_sample)
        if needed <= seconds:
            chosen.append(run)
            seconds -= needed
    return chosen

def fit_report(device: str, minutes: float, rehearse: bool) -> str:
    "Measure the networks in each precision, and list the runs that fit into the time."
    lines = []
    for precision in PRECISIONS:
        if precision == "bf16" and rehearse: continue  # few CPUs support it natively
        rates = throughput(device, precision, rehearse)
        lines += [f"{precision} {model} batch {size}: {1 / s:,.0f} samples/s" for (model, size), s in rates.items()]
        runs = that_fit(by_priority(device="cpu"), 60 * minutes, rates)
        lines.append(f"{precision}: {len(runs)} runs fit into {minutes:g} minutes")
        lines += [f"  {run.path.as_posix()}" for run in runs]
    return "\n    ".join(lines)

def _process_of_two(rank, folder, device):
    "One of two processes, which exchange gradients by gloo and may share a GPU."
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    changed = change(short(device, torch.float64, processes=1))
    if rank == 0: torch.save(changed, f"{folder}/change.pt")
    dist.destroy_process_group()

def two_processes(device: str) -> Question:
    "Do two processes on one device make the same training as one?"
    def made():
        with tempfile.TemporaryDirectory() as tmp:
            torch.multiprocessing.spawn(_process_of_two, (tmp, device), nprocs=2)
            return torch.load(f"{tmp}/change.pt")
    return Question("two processes on one device against one, float64", made,
                    lambda: change(short(device, torch.float64)), distance, 1e-7)

def _try(name, step):
    "Run a step of the smoke test, and print its result and time. True unless it raised."
    begin = time.monotonic()
    try: good, found = True, step()
    except Exception as error: good, found = False, f"{type(error).__name__}: {error}"
    if isinstance(found, bool): good, found = found, ""
    print(f"{'ok ' if good else 'BAD'} {name} [{time.monotonic() - begin:.0f} s] {found}", flush=True)
    return good

def smoke(device: str, minutes: float, rehearse: bool = False) -> bool:
    "Check what only a GPU can show. True if nothing failed."
    precisions = PRECISIONS[:2] if rehearse else PRECISIONS
    steps = [("environment", lambda: _describe(device)), ("ten updates", lambda: ten_updates(device)),
             ("exact", lambda: not [q for q in exact_questions(device) if not q.ask()]),
             ("precisions", lambda: not [p for p in precisions if not precision_question(device, p).ask()]),
             ("clock", lambda: clock_agrees(device)), ("memory", lambda: memory_limit(device)),
             *((f"SIGTERM on {d}", lambda d=d: interrupted_command(d)) for d in dict.fromkeys((device, "cpu"))),
             ("throughput", lambda: fit_report(device, minutes, rehearse)),
             ("two processes", two_processes(device).ask),
             ("compile", compile_question(device, "fp32").ask)]
    return not [name for name, step in steps if not _try(name, step)]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="that the runs are to fit into (default: 9)")
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--rehearse", action="store_true", help="in small, on whatever device there is")
    options = parser.parse_args()
    def command():
        check_device(options.device)
        return 0 if smoke(**vars(options)) else 1
    return exit_code(command)

if __name__ == "__main__": sys.exit(main())
