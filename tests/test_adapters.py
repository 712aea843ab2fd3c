"""The recipes of nbs/adapters.ipynb in two processes, where shards are uneven and one of them is empty."""

import json
from pathlib import Path

import pytest
from conftest import together

from adabatch.loader import Plan
from adabatch.schedule import adabatch

NOTEBOOK = Path(__file__).parents[1] / "nbs/adapters.ipynb"


def code(section):
    "The code cells below a heading, one after another."
    below, cells = False, []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("#"):
            below = source.splitlines()[0].strip("# ") == section
        elif below and cell["cell_type"] == "code":
            cells.append(source)
    return "\n".join(cells)


def run(section, folder):
    names = {}
    exec(code("Adapters") + "\n" + code("One training for all"), names)
    names["folder"] = folder  # the same in all processes
    exec(code(section), names)


@pytest.mark.parametrize(
    "section, package",
    [
        ("PyTorch", "torch"),
        ("Accelerate", "accelerate"),
        ("Hugging Face", "transformers"),
        ("Lightning", "lightning"),
    ],
)
def test_in_two_processes(section, package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    together(2, run, section, tmp_path)


def test_a_loader_prepared_by_accelerate_loses_no_sample():
    "It deals out whole batches in turn; were `plan.batch_size` a number, it would drop those of another size."
    accelerate = pytest.importorskip("accelerate.data_loader", reason="accelerate is not installed")
    plan = Plan(adabatch(16, 64, lr=0.1, every=1, epochs=3), 100)
    first, second = (accelerate.BatchSamplerShard(plan, 2, process) for process in range(2))
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == list(plan)
