# make serve   set up, fetch the default model once, serve it on http://127.0.0.1:8000
# make test    set up and run the test suite
# make check   formatting, lints, types, layers       make slow   the long tests       make bench   the benchmarks
# make nano    train the model that ships with Kvern, from its data to the package (hours on two cores)
# make sanitize   the kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (needs cmake, g++)
#
# PYTHON       the interpreter to build the environment with (3.11 or newer)
# FUZZ         `make sanitize`: how many random calls, and the first's seed, as in FUZZ="100000 7"
# MODEL, PORT  what `make serve` serves, and where
# TORCH_INDEX  a wheel index for torch alone: its CPU build instead of gigabytes of CUDA, or a particular CUDA
#              (the URL is on PyTorch's install page), as in: make serve TORCH_INDEX=https://...

PYTHON ?= python3
MODEL ?= coder-0.5b
PORT ?= 8000
FUZZ ?= 1000 1
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: serve test slow check bench nano sanitize clean

serve: $(VENV)/installed
	$(BIN)/kvern pull $(MODEL)
	$(BIN)/kvern serve $(MODEL) --port $(PORT)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.decode

nano: $(VENV)/installed-dev
	$(BIN)/python -m recipes.nano data
	$(BIN)/python -m recipes.nano train --out runs/nano --resume auto
	$(BIN)/kvern train export runs/nano runs/nano-fp8 --dtype fp8
	$(BIN)/python -m recipes.nano measure runs/nano-fp8 --json runs/nano.json
	$(BIN)/python -m recipes.nano bundle runs/nano-fp8

sanitize:
	for kind in address,undefined thread; do \
	  build=build/sanitize-$${kind%%,*}; \
	  cmake -S . -B $$build -DKVERN_SANITIZE=$$kind -DCMAKE_BUILD_TYPE=RelWithDebInfo && \
	  cmake --build $$build --target driver fuzz && $$build/driver && $$build/fuzz $(FUZZ) || exit 1; \
	done

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kvern needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist
