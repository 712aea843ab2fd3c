"""What the notebooks show: `make show` executes them in place, and a test compares what they store with what they give.

    python tests/show.py [NOTEBOOK ...]
"""
import os, re, sys, tempfile
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
VOLATILE = re.compile(r"^# .*\bof this machine\b", re.M | re.I)  # the comment that marks a cell, for the reader too
LARGEST = 100_000  # bytes of a figure
STYLE = {"OMP_NUM_THREADS": "1", "IN_TEST": "1", "MATPLOTLIBRC": str(ROOT / "tests/matplotlibrc"),
         "PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm's, which would draw its bars with ipywidgets

def notebooks(): return sorted(ROOT.glob("nbs/*.ipynb"))

def kept_elsewhere(path):
    "Is the executed notebook evidence, kept under outputs/?"
    return any(ROOT.glob(f"outputs/{path.name}")) or any(ROOT.glob(f"outputs/*/{path.name}"))

def execute(path):
    "The notebook, executed in its folder by a kernel of its own. Raises nbclient's error if a cell does."
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", coalesce_streams=True, record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}})
    return client.execute(env=os.environ | STYLE)

def shown(output):
    "What a reader sees of an output: its text, or that it is a figure."
    if output.output_type == "stream": return output.text
    data = output.get("data", {})
    if "image/png" in data: return "<figure>\n"
    return data.get("text/markdown") or data.get("text/plain", "")

def complaint(cell, executed):
    "What is wrong with the stored outputs of a cell, or None."
    now, stored = ("".join(map(shown, c.outputs)) for c in (executed, cell))
    figures = [len(o.data["image/png"]) * 3 // 4 for o in executed.outputs if "image/png" in o.get("data", {})]
    if any(o.get("name") == "stderr" for o in executed.outputs): return "it writes to stderr"
    if any(folder in now for folder in (f"{ROOT}/", f"{Path.home()}/", f"{tempfile.gettempdir()}/")):
        return "it shows a path of this machine"
    if max(figures, default=0) > LARGEST: return f"a figure has {max(figures):,} bytes, of at most {LARGEST:,}"
    if VOLATILE.search(cell.source): now, stored = bool(now), bool(stored)
    if now == stored: return None
    if not stored: return "its output is not stored"
    if VOLATILE.search(cell.source): return "it gives nothing, but shows something"
    pairs = zip_longest(now.splitlines(), stored.splitlines())
    new, old = next((pair for pair in pairs if pair[0] != pair[1]), ("", "more or fewer ends of lines"))
    return f"it gives the line {new!r:.200}, but shows {old!r:.200}"

def complaints(path):
    "One line for each cell of a notebook that shows something else than executing it gives."
    executed, stored = execute(path), nbformat.read(path, as_version=4)
    if kept_elsewhere(path): return []
    pairs = [(s, e) for s, e in zip(stored.cells, executed.cells) if s.cell_type == "code"]
    return [f"{path.stem}, cell {s.id}: {found}" for s, e in pairs if (found := complaint(s, e))]

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or [p for p in notebooks() if not kept_elsewhere(p)]):
        print(path, flush=True)
        nbformat.write(execute(path.absolute()), path)
