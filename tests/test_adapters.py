"""The recipes of nbs/adapters.ipynb in two processes, where shards are uneven and one of them is empty."""

import json
from pathlib import Path

import pytest
from conftest import together
from torch.utils.data import DataLoader

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
        ("Hugging Face `Trainer`", "transformers"),
        ("Lightning", "lightning"),
    ],
)
def test_in_two_processes(section, package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    together(2, run, section, tmp_path)


def prepare_a_loader():
    from accelerate import Accelerator

    loader = DataLoader(range(100), batch_sampler=Plan(adabatch(16, 64, lr=0.1), 100))
    with pytest.raises(ValueError, match="even_batches=False"):
        Accelerator(cpu=True).prepare(loader)


def test_accelerate_refuses_to_deal_out_the_batches_of_a_plan():
    "A number as `batch_size` of the plan would make it drop all other batches instead."
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    together(2, prepare_a_loader)
