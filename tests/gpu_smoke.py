"""What only a GPU can show, beside `python -m adabatch.gpu`: python tests/gpu_smoke.py [STEP ...] [--device cuda].

Ten updates in which a wait for the device is an error; the clock; memory; two processes on one GPU; interruption. A
step that fails is named, and the next one begins.
"""
import argparse, contextlib, signal, subprocess, sys, tempfile, time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from adabatch import record, trainer as engine
from adabatch.device import Interrupted, best_device, check_device, device_settings, synchronize
from adabatch.experiment import Experiment, exit_code, resolve
from adabatch.gpu import Question, _load, _small, made
from adabatch.train import environment, make_trainer
from adabatch.trainer import Trainer, prepare

def _one_stage(model, device, batch_size, updates, **settings):
    "A trainer of one epoch with `updates` updates on random images."
    e = Experiment(model, "fake", "fixed", batch_size, epochs=1, every=1, device=device, **settings)
    return make_trainer(resolve(e, here=False), _small(_load("fake", device=device), batch_size * updates))

def _epoch_seconds(trainer) -> tuple[float, list[float]]:
    "Seconds of one epoch by a synchronised clock, and the trainer's own: of its phases, and of everything."
    with device_settings(trainer.device, trainer.precision):
        prepare(trainer)
        begin = time.perf_counter()
        trainer.train_epoch(lambda updates: None)
        synchronize(trainer.device)
        return time.perf_counter() - begin, trainer.state.sums.seconds

def ten_updates(device: str, graphs: bool = False) -> str:
    "Ten updates in which any host synchronisation raises RuntimeError."
    trainer = _one_stage("resnet20", device, 64, 10, compile=graphs)
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
    whole, (*phases, own) = _epoch_seconds(_one_stage("alexnet", device, 64, 80))
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
    data = _small(_load("digits", device=device), 512)
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

SHORT = dict(samples=64, dtype=torch.float64)

def _process_of_two(rank, folder, device):
    "One of two processes, which exchange gradients by gloo and may share a GPU."
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    changed = made(device, processes=1, **SHORT)
    if rank == 0: torch.save(changed, f"{folder}/change.pt")
    dist.destroy_process_group()

def two_processes(device: str) -> Question:
    "Do two processes on one device make the same training as one?"
    def by_two(seed):
        with tempfile.TemporaryDirectory() as tmp:
            torch.multiprocessing.spawn(_process_of_two, (tmp, device), nprocs=2)
            return torch.load(f"{tmp}/change.pt")
    return Question("two processes on one device against one, in float64", by_two,
                    lambda seed: made(device, **SHORT), 1e-7)

def _try(name, step):
    "Run a step of the smoke test, and print its result and time. True unless it raised."
    begin = time.monotonic()
    try: good, found = True, step()
    except Exception as error: good, found = False, f"{type(error).__name__}: {error}"
    if isinstance(found, bool): good, found = found, ""
    print(f"{'ok ' if good else 'BAD'} {name} [{time.monotonic() - begin:.0f} s] {found}", flush=True)
    return good

def steps(device: str) -> dict:
    "What is tried, by name."
    return {"ten updates": lambda: ten_updates(device), "ten by graphs": lambda: ten_updates(device, True),
            "clock": lambda: clock_agrees(device), "memory": lambda: memory_limit(device),
            "two processes": two_processes(device).ask,
            **{f"SIGTERM on {d}": lambda d=d: interrupted_command(d) for d in dict.fromkeys((device, "cpu"))}}

def smoke(device: str, names: list[str]) -> bool:
    "Try the steps of these names; all, without names. True if nothing failed."
    return not [name for name, step in steps(device).items() if name in (names or [name]) and not _try(name, step)]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the steps; default: all")
    parser.add_argument("--device", default=best_device())
    options = parser.parse_args()
    def command():
        check_device(options.device)
        engine.GRAPHED = ("cuda", options.device)  # elsewhere, recorded passes are called again
        return 0 if smoke(options.device, options.names) else 1
    return exit_code(command)

if __name__ == "__main__": sys.exit(main())
