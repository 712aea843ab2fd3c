"""The recipes of nbs/your_loop.ipynb, each cell on its own, and in two processes with uneven and empty shards."""

import copy, itertools, json, pickle, re, subprocess, sys
from pathlib import Path

import pytest
from accelerate.data_loader import BatchSamplerShard
from conftest import together
from test_loader import AT_5, Indices, groups
from torchdata.stateful_dataloader import StatefulDataLoader

from adabatch import Plan, Schedule, Stage, adabatch

NOTEBOOK = Path(__file__).parents[1] / "nbs/your_loop.ipynb"
CELLS = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]]
FIRST, LAST = (next(i for i, c in enumerate(CELLS) if c.startswith(h)) for h in ("## Checked", "### What was checked"))
RECIPES = {m[1]: cell for cell in CELLS[:FIRST] if (m := re.search(r"^def train_(\w+)\(", cell, re.M))}
PACKAGES = dict(accelerate="accelerate", transformers="transformers", lightning="lightning", fabric="lightning")

def execute(recipe):
    "The page without its other recipes."
    names = {}
    saving = next(cell for cell in CELLS if cell.startswith("import os, torch\n\ndef save("))
    code = [cell for cell in CELLS[FIRST:LAST] if cell.startswith(("import", "class", "def", "scratch"))]
    exec("\n".join([saving, *code, RECIPES[recipe]]), names)
    return names

def run(recipe, package, folder):
    names = execute(recipe)
    names["folder"] = folder  # the same in all processes
    stages = Stage(0, 9, 0.05), Stage(0.9, 1, 0.04), Stage(0.95, 9, 0.05), Stage(1.3, 18, 0.05), Stage(1.8, 36, 0.05)
    names["schedule"] = Schedule(stages, epochs=3)
    names["check"](package, names[f"train_{recipe}"])

@pytest.mark.parametrize("recipe", ["processes", "micro_batches", *PACKAGES])
def test_in_two_processes(recipe, tmp_path):
    package = PACKAGES.get(recipe, "torch")
    together(2, run, recipe, package, tmp_path)

def test_every_cell_can_be_copied_alone():
    assert len(RECIPES) >= 12
    for name, cell in RECIPES.items():
        command = [sys.executable, "-m", "ruff", "check", "--quiet", "--isolated", "--select", "F821,F401", "-"]
        found = subprocess.run(command, input=cell, capture_output=True, text=True)
        assert found.returncode == 0, f"{name}: {found.stdout}"

def test_a_sampler_of_ones_own_is_dealt_to_the_processes():
    "The shards of two processes are the batches of one."
    names = execute("weighted")
    one, *two = (names["Weighted"](names["schedule"], 100, rank=r, world_size=n) for r, n in ((0, 1), (0, 2), (1, 2)))
    batches = list(one)
    assert [a + b for a, b in zip(*two, strict=True)] == batches
    assert any(len(set(batch)) < len(batch) for batch in batches)  # drawn with replacement

@pytest.mark.filterwarnings("ignore:the plan has given all")
def test_a_loader_prepared_by_accelerate_loses_no_sample():
    "It deals out whole batches in turn; were `plan.batch_size` a number, it would drop those of another size."
    plan = Plan(adabatch(16, 64, lr=0.1, every=1, epochs=3), 100)
    first, second = (BatchSamplerShard(plan, 2, process) for process in range(2))
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == list(plan)

def drawn_from(plan, loader, by_epoch):
    for _ in plan.by_epoch() if by_epoch else [0]:
        for indices, _ in loader: yield indices.tolist()

@pytest.mark.filterwarnings("ignore:plan.start is .*, where iterating began")
@pytest.mark.filterwarnings("ignore:the epoch gave 6 batches")
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("by_epoch", [False, True])
def test_stateful_data_loader(workers, by_epoch):
    whole = list(Plan(AT_5, 100))
    for received in (0, 4, 5, 6, len(whole) - 1):
        plan = Plan(AT_5, 100)
        first = StatefulDataLoader(Indices(), batch_sampler=plan, num_workers=workers)
        plan.lr_scheduler(groups(0.1))
        got = list(itertools.islice(drawn_from(plan, first, by_epoch), received))
        state = first.state_dict()
        assert got == whole[:received] and len(pickle.dumps(state)) < 2000
        plan = Plan(AT_5, 100)
        plan.start = received
        second = StatefulDataLoader(Indices(), batch_sampler=plan, num_workers=workers)
        second.load_state_dict(copy.deepcopy(state))
        got += drawn_from(plan, second, by_epoch)
        assert got == whole
