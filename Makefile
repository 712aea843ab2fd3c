# Every target sets up what it needs in .venv/ first; nothing is installed anywhere else.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup run test torture sweep evidence report notebooks gpu bench lab export show docs
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

.venv/.test-ready: .venv/.ready requirements-test.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --no-deps --python $(BIN)/python -r requirements-test.lock
	touch $@

test: .venv/.test-ready  ## the notebooks, with what they show, and the exported modules; two at a time, as many start several processes
	python -m pytest -q -n 2 --dist worksteal tests

show: setup  ## execute the notebooks, so that they show what they gave (NB=nbs/03_loader.ipynb for one)
	python tests/show.py $(NB)
	nbdev_clean

torture: setup  ## kill runs at 200 random and named moments: all must end in the same record (KILLS=40)
	python tests/torture.py $(KILLS)

sweep: setup  ## make what is missing of the paper's grid (ARGS="--dataset cifar100 --seeds 5")
	python -m adabatch.sweep $(ARGS)

evidence: setup  ## what two CPU cores can make of the paper, in order of worth, beside other work; SIGTERM stops it
	OMP_NUM_THREADS=1 nice -n 19 python -m adabatch.sweep --grid cpu --device cpu $(ARGS)

report: setup  ## execute the report and the galleries on outputs/, one HTML page of the report; rewrites the README's results
	papermill nbs/report.ipynb outputs/report.ipynb
	for folder in $$(ls -d outputs/*/); do papermill nbs/gallery.ipynb $${folder}gallery.ipynb -p dataset $$(basename $$folder) || exit 1; done
	python -m adabatch.report outputs README.md
	jupyter nbconvert --to html --template classic --HTMLExporter.mathjax_url= --HTMLExporter.require_js_url= \
		--HTMLExporter.jquery_url= outputs/report.ipynb

notebooks: setup  ## execute run.ipynb again for every record, to show its training's log; trains nothing
	python -c 'import sys; from adabatch.report import render; sys.exit(bool(render("outputs")))'

gpu: setup  ## on a machine with a GPU: check it, then the paper's runs in order of worth (ARGS="--minutes 30 --precision bf16")
	python -m adabatch.gpu $(ARGS)

bench: setup  ## samples per second over the batch size, beside other loops; half an hour, with nothing else running (ARGS="-p networks alexnet")
	mkdir -p outputs
	papermill nbs/benchmark.ipynb outputs/benchmark.ipynb $(ARGS)

lab: setup  ## read and run the notebooks
	jupyter lab nbs

export: setup  ## notebooks -> adabatch/; the notebooks cleaned of everything but their outputs
	nbdev_export
	nbdev_clean

docs: _docs/.ready  ## the site, in _docs/html: its tools go into _docs/.venv, and nothing in it needs a network
	_docs/.venv/bin/python docs/pages.py _docs/source
	_docs/.venv/bin/python -m sphinx -q -j auto -c docs _docs/source _docs/html
	@echo "_docs/html/index.html"

_docs/.ready: docs/requirements.lock
	$(PYTHON) -m venv _docs/.venv
	_docs/.venv/bin/pip install --quiet --no-deps -r docs/requirements.lock
	touch $@
