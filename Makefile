# Everything starts here, from a fresh clone: `make demo`, `make test`. Needs Python >= 3.11, make and a C++ compiler.
#   demo     train and compare the models on a generated catalogue        lint    ruff and clang-format
#   test     the test suite; ARGS="-k name" is handed to pytest           format  apply them
#   check    what is slower: other compilers and architectures, packaging, sanitizers, the site
#   build    the compiled library, in the source tree                     clean   remove what was built
#   docs     the site, in build/docs; every warning is an error
#   bench    time the operators against their peers; ARGS="rq --quick" is handed to python -m benchmarks
#   gpu-test, gpu-bench   the operators' tests and benchmarks with the torch of PYTHON, on a machine with an NVIDIA GPU:
#            nothing is downloaded; `make gpu-test PYTHON=python` takes that of the active environment
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Errors only. What a mirror of the machine's pip settings lacks is no news.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALL := $(PIP) install -c constraints.txt
# A library that does not compile must not pass unseen here; BBQ_REQUIRE_CPU=0 works with the pure-Python package.
export BBQ_REQUIRE_CPU ?= 1

# On Linux the plain version of torch may be a CUDA build of several GB. PyTorch's own index has the CPU build where
# pip's other sources do not.
TORCH_PIN := $(shell grep '^torch==' constraints.txt)
TORCH ?= $(TORCH_PIN)$(if $(filter Linux,$(shell uname -s)),+cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
INSTALLED := $(VENV)/.installed
CLANG := $(VENV)/.clang
SPHINX := $(VENV)/.sphinx
BUILT := bbqrec_kernels/_build.json
OLD_TRITON := build/triton-3.6.0

.PHONY: demo test check docs build lint format clean bench gpu-test gpu-bench gpu-build

demo: build
	$(BIN)/bbqrec demo $(ARGS)

test: build
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: build $(CLANG) $(SPHINX) $(OLD_TRITON)
	$(BIN)/python tools/check.py $(ARGS)

docs: build $(SPHINX)
	$(BIN)/python tools/check.py docs
	@echo "Open build/docs/index.html"

build: $(BUILT)

bench: build
	@$(INSTALL) -e ".[bench]"
	$(BIN)/python -m benchmarks $(ARGS)

# Libraries that cannot be built there are named and left out: the Triton kernels need none.
gpu-build:
	BBQ_REQUIRE_CPU=0 $(PYTHON) setup.py -q build_libraries --inplace

gpu-test: gpu-build
	$(PYTHON) -m pytest tests/bbqrec_kernels $(ARGS)

gpu-bench: gpu-build
	$(PYTHON) -m benchmarks --device cuda $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis bbqrec_kernels/_C*.so $(BUILT)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): constraints.txt pyproject.toml setup.py
	@echo "Installing the packages of constraints.txt into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) "$(TORCH)" 2>/dev/null || $(INSTALL) --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	@$(INSTALL) setuptools cmake ninja
	@$(INSTALL) --no-build-isolation -e ".[models,dev]"
	@touch $@

# Clang with the C++ library and the headers of every system that the package promises to compile on.
$(CLANG): $(INSTALLED)
	@$(INSTALL) ziglang
	@touch $@

# What builds the site.
$(SPHINX): $(INSTALLED)
	@$(INSTALL) --no-build-isolation -e ".[docs]"
	@touch $@

# The oldest Triton that must compile the kernels. Where there is none for this machine, its test is skipped.
$(OLD_TRITON): $(INSTALLED)
	@$(PIP) install --no-deps --target $@ triton==3.6.0 2>/dev/null || rm -rf $@

$(BUILT): $(INSTALLED) CMakeLists.txt $(CPP)
	@$(BIN)/python setup.py -q build_libraries --inplace
	@touch $@
