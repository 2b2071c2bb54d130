# `make train` trains a first model and draws its samples; `make test` runs the tests. docs/pods.md
# explains `make test-faults` and `make pod`, studies/README.md the commands that measure something.
# This needs python3 >= 3.11, pip and make. ARGS goes to the command that a target runs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# XLA allocates large buffers at every step, which glibc by default returns to the kernel each time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1

.PHONY: train test test-faults test-peers notebooks reproduce pod docs bench bench-gpu race aot aot-test lint clean

train: $(VENV)/plots.stamp
	$(BIN)/python train.py $(ARGS)

# The tests of a file share fixtures and compiled programs, so one process runs them all.
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The tests of failures kill and stop processes, and require that runs recover. They take ten to
# twenty minutes.
test-faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m faults $(ARGS)

# Compare published networks with the originals, which need PyTorch, in an environment of its own.
test-peers:
	$(MAKE) VENV=.venv-peers .venv-peers/physicsnemo.stamp
	.venv-peers/bin/python -m pytest -m peers tests/test_peers.py $(ARGS)

# physicsnemo has EDM's networks. Without -c, because it requires other versions of packages that we
# do not use than constraints.txt has. torch-fidelity requires torchvision, which not every build of
# PyTorch has; what is compared does not need it.
$(VENV)/physicsnemo.stamp: $(VENV)/test,peers.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check nvidia-physicsnemo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torch-fidelity
	touch $@

# Execute the notebooks, and write them with their pictures.
notebooks: $(VENV)/notebooks.stamp
	$(BIN)/python notebooks/execute.py $(ARGS)

# Train the digits again, and compare the numbers with those of docs/results.md.
reproduce: $(VENV)/plots.stamp
	$(BIN)/python studies/results.py --check

# Two processes train, one is killed, and the run resumes.
pod: $(VENV)/plots.stamp
	$(BIN)/python studies/pod.py

# Build the site, build/site/index.html; a warning is an error.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q docs build/site
	@echo "see build/site/index.html"

# Compare the speed of diffjax with PyTorch's, which has an environment of its own. The three
# workloads took 23 minutes on two cores of a busy machine on 2026-11-23.
bench: $(VENV)/plots.stamp
	$(MAKE) VENV=.venv-peers .venv-peers/lucidrains.stamp
	$(BIN)/python studies/speed.py $(ARGS)
	$(BIN)/python studies/speed_page.py

bench-gpu: $(VENV)/cuda12.stamp
	$(MAKE) VENV=.venv-peers .venv-peers/lucidrains.stamp
	$(BIN)/python studies/speed.py --device=gpu $(ARGS)
	$(BIN)/python studies/speed_page.py

# Compare how near samples of diffjax and of PyTorch's packages come to Fashion-MNIST in the same
# CPU-seconds. On one core each entrant trains for 63 minutes in all, and then draws samples.
race: $(VENV)/plots.stamp
	$(MAKE) VENV=.venv-peers .venv-peers/lucidrains.stamp
	$(BIN)/python studies/race.py run $(ARGS)
	$(BIN)/python studies/race.py page

# Compile training steps for GPUs and TPUs that are not there, in an environment of their compilers.
# On two cores a program for a GPU takes minutes, and that for a TPU half an hour.
aot:
	$(MAKE) VENV=.venv-aot .venv-aot/cuda12,tpu.stamp
	PYTHONPATH=. .venv-aot/bin/python studies/aot.py $(ARGS)

# Compile the training step of DDPM's network for an H100, and hold it to bounds.
aot-test:
	$(MAKE) VENV=.venv-aot .venv-aot/cuda12,tpu,test.stamp
	.venv-aot/bin/python -m pytest -m faults tests/test_gpu_program.py $(ARGS)

# lucidrains' package requires torchvision, which not every build of PyTorch has; its network does
# not need it.
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

# All targets share one environment, to which each adds the extras that it needs. A first picture
# should not wait until all modules are compiled: Python compiles those that it imports.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    $(if $(filter plots,$*),--no-compile) -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
