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

# Python compiles what is imported, once: to compile all that is installed takes longer than to install it. Only torch,
# but for what few use, and our own are compiled at once, by all cores.
unexport PYTHONDONTWRITEBYTECODE
# The Python at hand installs into the environment if its pip can: one of its own comes with the lock, sooner than venv's.
# Asked where it is used only: other targets need not wait for it.
HAS_PIP  = $(shell $(PYTHON) -c 'import pip; print("yes" * (int(pip.__version__.split(".")[0]) > 22))' 2>/dev/null)
PIP      = $(if $(HAS_PIP),$(PYTHON) -m pip --python $(BIN)/python,$(BIN)/pip) --disable-pip-version-check install \
           --quiet --no-deps --no-compile
UV      := $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps
LOCKED  := --requirement requirements/lock.txt scikit-video==1.1.11 --editable .
COMPILE := $(BIN)/python -m compileall -q -j 0 -x 'torch/(_inductor|testing)/'

# torch by itself, pinned and by pip: whatever needs torch is then content with the build that is there. The lock is
# complete (make check asks pip), so its packages need no order: uv brings them in a tenth of pip's time. Where it reaches
# no index (it does not read pip's settings), pip does.
$(STAMP): requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv $(if $(HAS_PIP),--without-pip) $(VENV)
	$(PIP) $$(grep '^uv==' requirements/lock.txt)
	$(PIP) torch==2.13.0 & torch=$$!; \
	    $(UV) $(LOCKED) || $(PIP) $(LOCKED); others=$$?; \
	    wait $$torch && exit $$others
	$(COMPILE) src $(VENV)/lib/python*/site-packages/torch
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
