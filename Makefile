# Two commands: `make train` ends with a picture, `make test` with the tests passed. And
# `make test-faults`, `make pod`: see docs/pods.md.
# Needs python3 >= 3.11, pip and make; ARGS goes to train.py.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# XLA asks for large buffers at every step; glibc's defaults hand them back to the kernel each time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1

.PHONY: train test test-faults test-peers notebooks reproduce pod docs bench bench-gpu lint clean

train: $(VENV)/plots.stamp
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 $(ARGS)

# Ten to twenty minutes: processes are killed, stopped and starved, and must heal.
test-faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m faults $(ARGS)

# Published networks beside the originals, which want PyTorch: an environment of its own.
test-peers:
	$(MAKE) VENV=.venv-peers .venv-peers/physicsnemo.stamp
	.venv-peers/bin/python -m pytest -m peers tests/test_peers.py $(ARGS)

# It has EDM's networks, and wants other versions than constraints.txt of what we do not need.
$(VENV)/physicsnemo.stamp: $(VENV)/test,peers.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check nvidia-physicsnemo
	touch $@

# Each is executed, and written with its pictures.
notebooks: $(VENV)/notebooks.stamp
	$(BIN)/python notebooks/execute.py $(ARGS)

# Whether the digits come out as docs/results.md has them.
reproduce: $(VENV)/plots.stamp
	$(BIN)/python studies/results.py --check

# Two processes train, one is killed, and the run heals.
pod: $(VENV)/plots.stamp
	$(BIN)/python studies/pod.py

# The site, build/site/index.html, without a warning.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q docs build/site
	@echo "see build/site/index.html"

# diffjax beside PyTorch, which has an environment of its own. Its three
# workloads took 23 minutes on two cores of a busy machine on 2026-11-23.
bench: $(VENV)/plots.stamp
	$(MAKE) VENV=.venv-peers .venv-peers/lucidrains.stamp
	$(BIN)/python studies/speed.py $(ARGS)
	$(BIN)/python studies/speed_page.py

bench-gpu: $(VENV)/cuda12.stamp
	$(MAKE) VENV=.venv-peers .venv-peers/lucidrains.stamp
	$(BIN)/python studies/speed.py --device=gpu $(ARGS)
	$(BIN)/python studies/speed_page.py

# Its package asks for torchvision, which not every build of PyTorch has; its network does not.
$(VENV)/lucidrains.stamp: $(VENV)/peers.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    denoising-diffusion-pytorch ema-pytorch pytorch-fid
	touch $@

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffjax needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# One environment, grown by the extras that a command needs.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
