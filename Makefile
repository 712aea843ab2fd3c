# Every target sets up what it needs in .venv/ first (docs in _docs/, release in a temporary folder), and nowhere else.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup run test torture sweep evidence report notebooks gpu bench lab export show docs release
help:  ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/.ready  ## create the environment .venv/; the targets below do so first

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

run: setup  ## train AlexNet on digits with AdaBatch; notebook and record in runs/
	mkdir -p runs
	papermill nbs/run.ipynb runs/run.ipynb --no-progress-bar --stdout-file - -p output_dir runs

.venv/.test-ready: .venv/.ready requirements-test.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --no-deps --python $(BIN)/python -r requirements-test.lock
	touch $@

test: .venv/.test-ready  ## all notebooks and all tests
	@# two at a time: many start several processes
	python -m pytest -q -n 2 --dist worksteal tests

show: .venv/.test-ready  ## execute the notebooks, to show what they gave (NB=nbs/00_schedule.ipynb)
	python tests/show.py $(NB)
	nbdev_clean

torture: .venv/.test-ready  ## kill runs at 200 moments: all must end in the same record (KILLS=40)
	KILLS=$(or $(KILLS),200) python -m pytest -q tests/test_crash.py -k moments

sweep: setup  ## make the missing runs of the paper's grid (ARGS="--seeds 5")
	python -m adabatch.sweep $(ARGS)

evidence: setup  ## what two CPU cores can make of the paper, most valuable first
	OMP_NUM_THREADS=1 nice -n 19 python -m adabatch.sweep --grid cpu --device cpu $(ARGS)

report: setup  ## execute report and galleries on outputs/, update README's results
	papermill nbs/report.ipynb outputs/report.ipynb
	for folder in $$(ls -d outputs/*/); do papermill nbs/gallery.ipynb $${folder}gallery.ipynb -p dataset $$(basename $$folder) || exit 1; done
	python -m adabatch.report outputs README.md
	jupyter nbconvert --to html --template classic --HTMLExporter.mathjax_url= --HTMLExporter.require_js_url= \
		--HTMLExporter.jquery_url= outputs/report.ipynb

notebooks: setup  ## execute run.ipynb again for every record; trains nothing
	python -c 'import sys; from adabatch.report import render; sys.exit(bool(render("outputs")))'

gpu: setup  ## check this GPU, then the paper's runs on it (ARGS="--minutes 30")
	python -m adabatch.gpu $(ARGS)

bench: setup  ## samples per second over the batch size; half an hour, quiet machine
	mkdir -p outputs
	papermill nbs/benchmark.ipynb outputs/benchmark.ipynb $(ARGS)

lab: setup  ## read and run the notebooks (ARGS="--no-browser --port 9000")
	jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs $(ARGS)

export: setup  ## notebooks -> adabatch/, then clean the notebooks
	nbdev_export
	nbdev_clean

docs: _docs/.ready  ## build the site: _docs/html/index.html
	_docs/.venv/bin/python docs/pages.py _docs/source
	_docs/.venv/bin/python -m sphinx -q -j auto -c docs _docs/source _docs/html
	@echo "_docs/html/index.html"

release: setup  ## build the last commit in dist/, check it, try the wheel
	bash .ci/release

_docs/.ready: docs/requirements.lock
	$(PYTHON) -m venv _docs/.venv
	_docs/.venv/bin/pip install --quiet --no-deps -r docs/requirements.lock
	touch $@
