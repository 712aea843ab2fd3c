"Every notebook runs, and what it shows a reader who does not run it is what running it gives."

import nbformat
import pytest
import show

NOTEBOOKS = [path for path in show.notebooks() if path.stem != "report"]  # which test_report.py executes

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path):
    found = show.complaints(path)
    if found:
        name = path.relative_to(show.ROOT)
        pytest.fail(f"{found[0]} ({len(found)} such cells): type `make show NB={name}`", pytrace=False)

def cell(source, *texts):
    outputs = [nbformat.v4.new_output("stream", text=text) for text in texts]
    return nbformat.v4.new_code_cell(source, outputs=outputs)

@pytest.mark.parametrize("stored, now, found", [
    (cell("print(1)", "1\n"), cell("print(1)", "1\n"), None),
    (cell("print(2)", "1\n"), cell("print(2)", "2\n"), "it gives the line '2', but shows '1'"),
    (cell("print(1)"), cell("print(1)", "1\n"), "its output is not stored"),
    (cell("# Seconds of this machine", "1 s"), cell("# Seconds of this machine", "2 s"), None),
    (cell("# Seconds of this machine"), cell("# Seconds of this machine", "2 s"), "its output is not stored"),
    (cell("print()"), cell("print()", f"{show.ROOT}/data"), "it shows a path of this machine"),
])
def test_a_difference_is_found(stored, now, found): assert show.complaint(stored, now) == found
