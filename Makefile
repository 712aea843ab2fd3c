# Every target sets up what it needs in .venv/ first; nothing is installed anywhere else.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup run test torture sweep evidence report gpu bench lab export
setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

run: setup  ## train AlexNet on digits with AdaBatch; the executed notebook and its record go to runs/
	mkdir -p runs
	papermill nbs/run.ipynb runs/run.ipynb --no-progress-bar --stdout-file - -p output_dir runs

test: setup  ## the notebooks, then the exported modules
	nbdev_test --n_workers 1
	python -m pytest -q tests

torture: setup  ## kill runs at 200 random and named moments: all must end in the same record (KILLS=40)
	python tests/torture.py $(KILLS)

sweep: setup  ## make what is missing of the paper's grid (ARGS="--dataset cifar100 --seeds 5")
	python -m adabatch.sweep $(ARGS)

evidence: setup  ## what two CPU cores can make of the paper, in order of worth, beside other work; SIGTERM stops it
	OMP_NUM_THREADS=1 nice -n 19 python -m adabatch.sweep --grid cpu --device cpu $(ARGS)

report: setup  ## execute the report on outputs/, and make one HTML page and the README's figure of it
	papermill nbs/report.ipynb outputs/report.ipynb
	python -c 'from adabatch.analysis import *; plot_curves(collect("outputs"), "digits", "test_error", {}).savefig("outputs/digits_test_error.png", dpi=80)'
	jupyter nbconvert --to html --HTMLExporter.mathjax_url= --HTMLExporter.require_js_url= outputs/report.ipynb

gpu: setup  ## on a machine with a GPU: check it, then the paper's runs in order of worth (ARGS="--minutes 30 --precision bf16")
	python -m adabatch.gpu $(ARGS)

bench: setup  ## seconds of each phase against the batch size, on noise
	python tests/bench.py

lab: setup  ## read and run the notebooks
	jupyter lab nbs

export: setup  ## notebooks -> adabatch/, outputs cleaned
	nbdev_export
	nbdev_clean
