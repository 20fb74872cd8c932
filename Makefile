# Needs Python 3.11 or later (PYTHON=...), make and a network to install from; installs into .venv*/ only.
# `make native` also needs a C++17 compiler.

PYTHON ?= python3
SLIDE ?= examples/CMU-1-Small-Region.svs
MODEL ?= nuclei-he
OUT ?= out/demo
DATA ?= ../shared/data
RUNS ?= ../darcnn-runs
NATIVE_PYTHON ?= .venv-native/bin/python
NATIVE_BUILD ?= build/native
NATIVE_OPTIONS ?=

PIP_OPTIONS := --quiet --disable-pip-version-check
EXTRAS := train,export,volumes,microscopes,micromanager,openvino,tensorrt-rtx,cluster,remote,native,dev
SOURCES := $(shell find runtime training export -name '*.py' -o -name '*.darcnn' -o -name py.typed)
FOLDERS := $(shell find runtime training export -type d -not -name __pycache__)
EDITABLE := --config-settings editable_mode=strict --editable
# Thread pools share the cores in a test run; threads that wait must not spin.
TEST_ENVIRONMENT := OMP_WAIT_POLICY=PASSIVE
# Most tests keep one core busy: two processes, the tests of a file in one of them, take little more than half the time.
TEST_PROCESSES ?= --numprocesses 2 --dist loadfile

define check_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "darcnn needs Python 3.11 or later, $(PYTHON) is not; run make PYTHON=/path/to/python3.11" >&2; exit 2; }
endef

.PHONY: help demo test proof lint models native clean

help:
	@echo "make demo   install darcnn into .venv and find the nuclei of $(SLIDE)"
	@echo "make test   install everything for a CPU into .venv-test (some 7 GB), run all checks and tests"
	@echo "make proof  what takes too long for every day: engines of whole tiles for every GPU that TensorRT-RTX knows, four channels"
	@echo "make lint   only the style and type checks"
	@echo "make models train the shipped models again from the images in $(DATA), in $(RUNS): hours; goes on where it stopped"
	@echo "make native build the C and C++ library, libdarcnn, and its example into $(NATIVE_BUILD); needs a C++17 compiler"
	@echo "make clean  remove what these made: environments, builds, caches, $(OUT)"

demo: .venv/installed
	.venv/bin/darcnn-run "$(SLIDE)" --model "$(MODEL)" --out "$(OUT)" --overwrite

test: lint
	$(TEST_ENVIRONMENT) .venv-test/bin/pytest $(TEST_PROCESSES) -m "not slow and not proof"
	$(TEST_ENVIRONMENT) .venv-test/bin/pytest $(TEST_PROCESSES) -m "slow and not proof" || test $$? -eq 5  # 5: there are none

proof: .venv-test/linked
	$(TEST_ENVIRONMENT) .venv-test/bin/pytest -m proof

lint: .venv-test/linked
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy -p darcnn.runtime -p darcnn.training -p darcnn.export

# The source stage is that of nuclei-he; the others start from what is shipped of it. nuclei-he has two more rounds
# (final/nuclei-he.darcnn). Particles are shipped in int8: three models in float16 are too much for one package.
models: .venv-test/linked
	for name in nuclei-fluorescence nuclei-he particles-cryoet; do \
		.venv-test/bin/darcnn-train run examples/recipes/$$name.toml --data "$(DATA)" --out "$(RUNS)/$$name" --resume && \
		.venv-test/bin/darcnn-export bundle "$(RUNS)/$$name" --out "$(RUNS)/$$name.darcnn" --overwrite \
		|| exit $$?; \
	done
	sed 's|^weights = .*|weights = "$(abspath $(RUNS))/nuclei-he.darcnn"|' examples/recipes/last/nuclei-he.toml \
		> "$(RUNS)/nuclei-he-last.toml"
	.venv-test/bin/darcnn-train run "$(RUNS)/nuclei-he-last.toml" --data "$(DATA)" --out "$(RUNS)/last" --resume
	mkdir -p "$(RUNS)/final" "$(RUNS)/int8"
	.venv-test/bin/darcnn-export bundle "$(RUNS)/last" --data "$(DATA)" --out "$(RUNS)/final/nuclei-he.darcnn" --overwrite
	.venv-test/bin/darcnn-export quantise "$(RUNS)/particles-cryoet.darcnn" --data "$(DATA)/tomograms/train" \
		--out "$(RUNS)/int8/particles-cryoet.darcnn" --overwrite

# OpenVINO, CMake and ninja are those of NATIVE_PYTHON. No wheel holds or needs any of this.
native: $(NATIVE_PYTHON)
	PATH="$$(cd "$$(dirname "$(NATIVE_PYTHON)")" && pwd):$$PATH" && export PATH && \
		openvino=$$($(NATIVE_PYTHON) -c 'from importlib.util import find_spec as f; print(*f("openvino").submodule_search_locations)') && \
		cmake -S runtime/native -B "$(NATIVE_BUILD)" -G Ninja -D OpenVINO_DIR="$$openvino/cmake" $(NATIVE_OPTIONS) && \
		cmake --build "$(NATIVE_BUILD)"

clean:
	rm -rf .venv .venv-test .venv-native build dist darcnn.egg-info "$(OUT)"
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A plain install, as a user has it. A build folder left by an earlier one would bring back removed files.
.venv/installed: setup.cfg pyproject.toml README.md LICENSE $(SOURCES)
	$(check_python)
	@echo "installing darcnn into .venv (some 0.5 GB)"
	$(PYTHON) -m venv .venv
	rm -rf build/lib
	.venv/bin/python -m pip install $(PIP_OPTIONS) .
	@touch $@

.venv-native/bin/python:
	$(check_python)
	@echo "installing cmake, ninja and openvino into .venv-native (some 0.4 GB)"
	$(PYTHON) -m venv .venv-native
	.venv-native/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt cmake ninja openvino

.venv-test/installed: setup.cfg pyproject.toml constraints.txt
	$(check_python)
	@echo "installing darcnn[$(EXTRAS)] into .venv-test (some 7 GB, minutes)"
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install $(PIP_OPTIONS) "setuptools>=77"
	.venv-test/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt $(EDITABLE) ".[$(EXTRAS)]"
	@touch $@

# A strict editable install links files one by one: a folder that changed has files to link or to forget.
.venv-test/linked: .venv-test/installed $(FOLDERS)
	.venv-test/bin/python -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation $(EDITABLE) .
	@touch $@
