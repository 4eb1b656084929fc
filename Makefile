# Each target does the set-up that it needs; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
BUILT := .venv/built

.PHONY: install demo test test-long test-kill test-ray lint bench cuda-check abi-check numerics hooks clean

install: $(BUILT)

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kdcore needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up .venv (torch is a large download, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@

# what has changed in csrc since; objects of the installation are reused
$(BUILT): $(READY) $(wildcard csrc/*.* csrc/*/*.*)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(BUILT)
	$(BIN)/kdcore run examples/digits.toml

# a process for each core, one thread in each; a file's tests stay together, for what they share is made once
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(BUILT)
	$(PYTEST)

test-long: $(BUILT)
	$(PYTEST) -m "not gpu" --timeout 3600

# runs killed at any instant must end with the uninterrupted run's student, by hash
N ?= 50
test-kill: $(BUILT)
	$(BIN)/python tests/kill.py $(N)

# the executor ray, with Ray in an environment of its own on top of .venv
RAY := .venv/ray
$(RAY)/ready: $(READY)
	$(PYTHON) -m venv $(RAY)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(RAY)/bin/python -m pip install --quiet $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["ray"])')
	@touch $@

test-ray: $(BUILT) $(RAY)/ready
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/test_ray.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# after a change to files that decide trained weights: raise kdcore.NUMERICS if it changes one, then record the files
numerics: $(READY)
	$(BIN)/python tests/test_numerics.py

# after a change to what plugins rely on: raise HOOKS_VERSION if an existing one can notice it, then record it
hooks: $(READY)
	$(BIN)/python tests/contract.py

bench: $(BUILT)
	$(BIN)/python benchmarks/bench_losses.py

# registers and spills of the CUDA kernels, by nvcc alone
cuda-check:
	@$(PYTHON) tests/cuda_check.py

# the build, loaded by other versions of torch than the one that built it: a large download for each, once
TORCH_VERSIONS ?= 2.11.0
abi-check: $(BUILT)
	$(BIN)/python tests/abi_check.py $(TORCH_VERSIONS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f kdcore/*.so kdcore/_build.json
