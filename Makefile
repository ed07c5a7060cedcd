# make reproduce   runs every chapter on the data it finds and builds the book
# make test        checks the style and the types, and runs the tests
# make book        builds the book from the stored runs
# make site        packs it in one archive, _build/site.zip, that opens without a network
# make plan        lists the published runs that are missing or outdated, and how long they take
# make published   makes them, as far as their data are there; PROFILE=gpu or PROFILE=slurm for other machines
# make gpu-check   holds a GPU against the CPU: speed, and that they agree
#
# Each makes the environment in .venv first, if it is not there; PYTHON=python3.12 chooses its interpreter.

BIN := .venv/bin
PYTHON ?= python3
# Fewer than the chapter's own, so that without data all chapters together take a quarter of an hour.
UCSD_EPOCHS ?= 6
# A few steps of two models: FactorVAE with the attention loss and without.
DISENTANGLEMENT ?= -p gammas 40 -p steps 60 -p stride 8
# The data sets of which files are there. The library says so, which needs nothing but Python for that: before .venv is
# made too, and for a path that make would take apart.
AT_HAND = $(eval AT_HAND := $(shell EXPVAE_DATA=$(call quoted,EXPVAE_DATA) PYTHONPATH=lib \
  $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m expvae_book.data.catalogue))$(AT_HAND)
quoted = '$(subst ','\'',$(value $(1)))'
MVTEC ?= -p epochs 1
# Samples are too small to keep two cores busy: two chapters at a time then, each on one. Real data take all cores.
JOBS ?= $(if $(filter mnist ucsd mvtec,$(AT_HAND)),1,2)

# Which folder of workflow/profiles says how the published runs are made.
PROFILE ?= local

INSTALLED := .venv/installed
GRID := .venv/grid
EXECUTED := _build/executed

# Torch takes seconds to compile: let every process after the first find what was compiled, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=
# Chapters ask for the kernel "python3": take that of .venv, not one that lies in the user's home.
export JUPYTER_PREFER_ENV_PATH := 1

# Chapters that compute. Those that come last read weights which others have trained.
COMPUTED := disentanglement mvtec15 mvtec10 ucsd mnist-1 mnist-3 method data reuse sanity forensics rbm-1 rbm-3 ablations
# Chapters that read what all others have stored.
READING := performance comparison index

.PHONY: reproduce test book site plan published gpu-check $(COMPUTED) $(READING)

reproduce: $(INSTALLED)
	$(BIN)/python -m expvae_book.data status
	mkdir -p $(EXECUTED)
	@$(if $(filter 1,$(JOBS)),,OMP_NUM_THREADS=1) $(MAKE) --no-print-directory -j$(JOBS) $(COMPUTED)
	@$(MAKE) --no-print-directory -j$(JOBS) $(READING)
	@$(MAKE) --no-print-directory book

data method reuse sanity forensics $(READING): $(INSTALLED)
	$(BIN)/papermill book/$@.md $(EXECUTED)/$@.ipynb
mnist-1 mnist-3: mnist-%: $(INSTALLED)
	$(BIN)/papermill book/mnist.md $(EXECUTED)/$@.ipynb -p digit $*
ucsd: $(INSTALLED)
	$(BIN)/papermill book/ucsd.md $(EXECUTED)/$@.ipynb -p epochs $(UCSD_EPOCHS)
mvtec15: $(INSTALLED)
	$(BIN)/papermill book/mvtec15.md $(EXECUTED)/$@.ipynb $(MVTEC)
mvtec10: mvtec15
	$(BIN)/papermill book/mvtec10.md $(EXECUTED)/$@.ipynb $(MVTEC)
disentanglement: $(INSTALLED)
	$(BIN)/papermill book/disentanglement.md $(EXECUTED)/$@.ipynb $(DISENTANGLEMENT)
rbm-1 rbm-3: rbm-%: mnist-%
	$(BIN)/papermill book/rbm.md $(EXECUTED)/$@.ipynb -p digit $*
ablations: mnist-1 mnist-3
	$(BIN)/papermill book/ablations.md $(EXECUTED)/$@.ipynb

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Pages read and draw; on threads of their own they would but wait for each other.
book: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/jupyter-book build book/ -W -n --keep-going
	@echo "$(CURDIR)/_build/html/index.html"

site: book
	$(BIN)/python -m expvae_book site _build/html _build/site.zip
	@echo "$(CURDIR)/_build/site.zip"

plan: $(GRID)
	$(BIN)/snakemake -n

published: $(GRID)
	$(BIN)/snakemake --profile workflow/profiles/$(PROFILE)

gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks gpu

$(GRID): $(INSTALLED)
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[grid]"
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; sys.exit(None if (3, 11, 4) <= v < (3, 14) else \
	  "Python 3.11.4 to 3.13 is needed, and $(PYTHON) is %d.%d.%d: choose one with make PYTHON=python3.12" % v)'
	@if [ -x $(BIN)/python ] && [ "$$($(BIN)/python -V)" != "$$($(PYTHON) -V)" ]; then \
	  echo ".venv was made with $$($(BIN)/python -V), and $(PYTHON) is $$($(PYTHON) -V): remove it with rm -r .venv" >&2; exit 1; fi
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5,<1"
	@# What this distribution was called before: its entry points lead nowhere, and papermill would load them all.
	$(BIN)/uv pip uninstall --quiet --python $(BIN)/python expvae-book
	rm -rf expvae_book.egg-info
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[test]"
	@touch $@
