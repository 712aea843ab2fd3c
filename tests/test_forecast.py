"""The arithmetic of a prediction, what is measured, and that the benchmark's baseline does the same work."""

import json, types
from pathlib import Path

import pytest
import torch

from conftest import small

from adabatch import forecast
from adabatch import trainer as engine
from adabatch.experiment import Experiment, resolve
from adabatch.forecast import measure, noise, samples_per_second
from adabatch.schedule import fixed
from adabatch.trainer import Trainer

def tiny(samples=256):
    model = small()
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), noise(samples), fixed(16, lr=0.01))

def test_a_measurement_trains_what_it_says_and_leaves_the_trainer_as_it_was(monkeypatch):
    trainer, trained = tiny(), []
    update = trainer.step.update
    def counted(samples, *rest):
        trained.append(samples)
        update(samples, *rest)
    monkeypatch.setattr(trainer.step, "update", counted)
    assert samples_per_second(trainer, 32, 3) > 0 and trained == [32] * 3
    before = trainer.plan, trainer.state, trainer.data.train_size
    found = measure(trainer, [32, 16], seconds=1)
    assert (trainer.plan, trainer.state, trainer.data.train_size) == before
    assert min(found.rates) == 16 and set(trained) == {16, 32}
    assert {len(rate.values) for rate in found.rates.values()} == {max(forecast.ROUNDS, len(found.rate(16).values))}
    assert all(rate.low <= rate.median <= rate.high for rate in found.rates.values())

def test_recorded_passes_of_all_sizes_are_measured(monkeypatch):
    monkeypatch.setattr(engine, "GRAPHED", ("cpu",))
    model = small()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), noise(256), fixed(16, lr=0.01), compile=True)
    measure(trainer, [16, 32], seconds=0.1)
    assert [x[0] for x, *_ in trainer.step.passes] == [16, 32]

def test_sizes_that_the_time_does_not_allow_are_left_out_with_all_above(monkeypatch):
    now = [0.0]
    def sixteen_a_second(trainer, size, updates):
        now[0] += size * updates / 16
        return 16.0
    monkeypatch.setattr(forecast, "samples_per_second", sixteen_a_second)
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: now[0])
    for seconds, sizes in ((28, [16, 32, 64]), (27, [16, 32]), (0, [16])):  # 1 + 2 + 4 to try, 3 * 7 for rounds
        now[0] = 0.0
        found = measure(tiny(), [128, 16, 64, 32], seconds)
        assert list(found.rates) == sizes
        assert now[0] - sum(sizes) / 16 <= max(seconds, 4)  # the first update of each is not counted

# --- the benchmark

def benchmark_worker():
    "The program that `nbs/benchmark.ipynb` writes for its processes, as a module."
    cells = json.loads(Path("nbs/benchmark.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    parts = [source.split("\n", 1)[1] for source in sources if source.startswith("%%program")]
    module = types.ModuleType("worker")
    exec("\n".join(parts), vars(module))
    return module

@pytest.mark.parametrize("way", ["original", "plain", "ours"])
def test_every_way_trains_the_same_number_of_samples(way, monkeypatch):
    worker, seen = benchmark_worker(), []
    monkeypatch.setattr(worker, "WORKERS", 0)  # processes of a DataLoader are slow to start
    run = resolve(Experiment("alexnet", "fake", "fixed", 16))
    trained = worker.WAYS[way](run, samples=256)
    model = trained.trainer.model if way == "ours" else trained.model
    model.register_forward_pre_hook(lambda module, x: seen.append(len(x[0])))
    assert trained.rate(16, 3) > 0
    timed = seen[-3:]
    assert timed == [16] * 3
    assert len(seen) <= 4 and set(seen) == {16}  # a loader that was just made is given one update to get going
    assert all(p.grad is None or bool(p.grad.any()) for p in model.parameters())
