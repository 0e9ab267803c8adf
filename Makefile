PYTHON ?= python3

export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(VIRTUAL_ENV)/bin:$(PATH)

# what the libraries are built from
native := CMakeLists.txt pyproject.toml native patches $(wildcard cmake/* native/* native/*/* patches/*)

help:
	@echo 'make demo    answer questions about pictures, over the full and over a pruned cache'
	@echo 'make test    run all tests'
	@echo 'make families  make small models of many families, for tests: installs PyTorch, transformers'
	@echo 'make lock    bring requirements.lock up to date with pyproject.toml'
	@echo 'make clean   remove all that was built and installed here'

demo: .venv/csp-edge
	@csp-edge demo

# models of families, once made, are kept up to date
test: .venv/csp-edge $(wildcard build/families/made)
	@pytest

families: build/families/made

build/families/made: .venv/families/installed requirements.lock $(wildcard tools/families/*) | .venv/csp-edge
	@.venv/families/bin/python tools/families/make.py build/patched/source build/families
	@touch $@

# not in the lock: on many machines PyTorch comes with gigabytes of CUDA, unless pip finds another build
.venv/families/installed: tools/families/requirements.txt | .venv/packages
	@echo 'Installing PyTorch and transformers into .venv/families'
	@$(PYTHON) -m venv .venv/families
	@.venv/families/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-r $<
	@touch $@

# csp-edge, from this very tree. Only what changed since is compiled.
.venv/csp-edge: .venv/packages .venv/options $(native)
	@echo 'Building the patched llama.cpp, the first time in some two minutes'
	@uv pip install --quiet --no-deps --no-build-isolation --reinstall --editable .
	@touch $@

# CMake forgets the options of the last time when it is given others
.venv/options: .venv/packages FORCE
	@echo "$$CMAKE_ARGS" | cmp --silent - $@ || \
		{ rm -f build/patched/CMakeCache.txt; echo "$$CMAKE_ARGS" > $@; }

# The locked packages. The build tools come first, as llama-cpp-python is built with them.
.venv/packages: requirements.lock | tools
	@echo 'Installing the locked packages into .venv'
	@$(PYTHON) -m venv .venv
	@sed -n '/^uv==/,/[^\\]$$/p' $< > .venv/uv.txt
	@python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	@uv pip install --quiet --constraints $< cmake ninja pip scikit-build-core
	@uv pip sync --quiet --no-build-isolation --require-hashes $<
	@touch $@

lock: .venv/packages
	@uv pip compile --quiet --universal --generate-hashes --no-header --extra eval --group dev pyproject.toml \
		--output-file requirements.lock

clean:
	rm -rf .venv build

# what only the system's package manager can install
tools:
	$(if $(shell command -v $(PYTHON)),,$(error python3 is missing: apt install python3-venv))
	$(if $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 10) or "")'),, \
		$(error $(PYTHON) is older than 3.10: apt install python3.11-venv, then make PYTHON=python3.11))
	$(if $(shell $(PYTHON) -c 'import ensurepip; print(1)' 2>&1 | grep -x 1),, \
		$(error Python's venv module is missing: apt install python3-venv))
	$(if $(shell command -v $(firstword $(CXX))),,$(error the C++ compiler $(CXX) is missing: apt install g++))
	$(if $(shell command -v git),,$(error git is missing: apt install git))
	@:

FORCE:

.PHONY: help demo test families lock clean tools FORCE
