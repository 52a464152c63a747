# Every target creates what it needs; `make demo` and `make test` work on a machine with Python and git alone.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -q
READY := $(VENV)/.ready

# ttsem asks for Python 3.12 but runs on 3.10; without its dependencies it brings nothing along.
TTSEM := ttsem==0.1.0

# What else runs models on a CPU: the extra `bench` of pyproject.toml, without building the project again.
RUNTIMES := openvino onnx onnxruntime

.PHONY: demo test lint prove bench gpu wheel arm arm-wheel clean

demo: $(READY)
	$(RUN) -m ceit demo

# Lint, and the tests as they are, in Triton's interpreter and under ttsem: side by side, and all of them in any case.
test: $(READY)
	$(RUN) tests/run.py

# Style and formatting of Python and C++, imports between packages, types.
lint: $(READY)
	$(RUN) tests/run.py lint

# Two test processes share two cores: a thread each, and where a test asks for more, they sleep while they wait.
prove: export OMP_NUM_THREADS = 1
prove: export OMP_WAIT_POLICY = passive
prove: $(READY)
	@status=0; $(PYTEST) -n 2 -m prove || status=1; $(RUN) tests/run.py ttsem || status=1; exit $$status

# The report is runs/bench/report.md. ARGS passes options on, e.g. make bench ARGS=--quick
# The other runtimes are optional: offline, what is not there yet is listed as absent.
bench: $(READY)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --retries 1 -c constraints.txt $(RUNTIMES) \
		|| echo "Going on without those of $(RUNTIMES) that are not installed."
	$(RUN) -m benchmarks --report runs/bench $(ARGS)

# On a machine with an NVIDIA GPU, with or without network: PYTHON has PyTorch and Triton for it. What else is needed comes
# into an environment beside it, or is what PYTHON has.
GPU_VENV := .cache/gpu
gpu:
	@$(PYTHON) -m venv --system-site-packages $(GPU_VENV) \
		&& $(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 -e ".[test]" \
		|| { echo "Going on with what $(PYTHON) has."; rm -rf $(GPU_VENV); }
	python="$(GPU_VENV)/bin/python"; test -x "$$python" || python="$(PYTHON)"; \
		"$$python" setup.py build_ext --inplace && "$$python" -m benchmarks.gpu $(ARGS)

# One wheel for every Python from 3.10 and PyTorch from 2.10, with code for every GPU that the kernels run on.
wheel: export TORCH_CUDA_ARCH_LIST ?= 8.0;8.6;8.9;9.0;10.0;12.0+PTX
wheel: $(READY)
	$(RUN) -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation -v -w dist .

# The code for the CPU as a 64-bit Arm runs it, emulated; ARGS are of pytest. And its wheel, cross-compiled. On Debian, x86.
arm: $(READY)
	$(RUN) .ci/arm.py test $(ARGS)
arm-wheel: $(READY)
	$(RUN) .ci/arm.py wheel

$(READY): csrc/native_build.py pyproject.toml setup.py constraints.txt Makefile
	@echo "Setting up $(VENV); the first time this downloads PyTorch, which takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python $(TTSEM)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
