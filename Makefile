# make quickstart          teach a small chat model its name (NAME="Ada" sets the name)
# make quickstart-llava    add image input and ask about images (15 minutes on two cores)
# make quickstart-tools    teach it to call tools, and measure that (5 minutes on two cores)
# make quickstart-overfit  quickstart without general conversations, to show forgetting
# make web                 chat with the quick start's run in the browser, next to its base model
# make venv                create .venv with the xtuner command
# make test | test-slow    run the tests | the slow tests (JOBS=1: in one process)
# make test-gpu            run the tests that need an NVIDIA GPU
# make bench               compare xtuner with other trainers on this CPU (DATA=rows.json sets the data)
# make check-gpu           check correctness and speed on an NVIDIA GPU (four minutes)
# make test-python         test settings on Python 3.12 and 3.13, where installed
# make check               what CI runs: format, lint, types, import layers, tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NAME ?= Ada
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

# One process per core, at most 1 GB each. Tests of a file share fixtures, so they run in one process.
JOBS ?= auto
SPREAD := -n $(JOBS) --maxprocesses 4 --dist loadfile

BENCH := $(or $(XTUNER_HOME),$(HOME)/.cache/xtuner)/bench
BENCH_DATA := $(if $(DATA),--data "$(DATA)")

.PHONY: bench bench-gpu check-gpu venv dev quickstart quickstart-overfit quickstart-llava quickstart-tools web test test-slow test-gpu test-without-cpu-kernels test-python check format docs clean

venv: .venv/.installed
dev: .venv/.dev

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xtuner needs Python 3.11 or newer, but $(PYTHON) is %d.%d; run: make PYTHON=/path/to/python3.11 ..." % sys.version_info[:2])'
	@echo "Setting up .venv (once, about a minute with a warm package cache)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[all]"
	@touch $@

.venv/.dev: .venv/.installed
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: venv
	@PYTHON=$(BIN)/python bash examples/quickstart/run.sh "$(NAME)"

quickstart-overfit: venv
	@PYTHON=$(BIN)/python bash examples/quickstart/overfit.sh "$(NAME)"

quickstart-tools: venv
	@PYTHON=$(BIN)/python bash examples/tools/run.sh

quickstart-llava: venv
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[examples]"
	@PYTHON=$(BIN)/python bash examples/llava/run.sh

web: venv
	@test -f quickstart/work_dir/last_checkpoint || $(MAKE) --no-print-directory quickstart
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[all,web]"
	@$(BIN)/xtuner web "$$($(BIN)/xtuner fetch smollm2_135m_instruct)" quickstart/work_dir --runs quickstart

# Peers have their own environments, with the versions listed in docs/benchmarks.md.
$(BENCH)/trl/.installed:
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq torch==2.13.0 transformers==5.23.0 trl==1.16.0 peft datasets
	@touch $@

$(BENCH)/llamafactory/.installed:
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq torch==2.13.0 llamafactory==0.9.5
	@$(@D)/bin/python -m pip uninstall -qqy torchaudio torchvision
	@touch $@

bench: dev $(BENCH)/trl/.installed $(BENCH)/llamafactory/.installed
	@$(BIN)/xtuner fetch smollm2_135m_instruct
	@$(BIN)/python benchmarks/cpu.py $(BENCH_DATA)
	@$(BIN)/python benchmarks/memory.py $(BENCH_DATA)

# Needs an NVIDIA GPU. Weights are random and the runs are offline, so TRL's flash attention is fetched
# first. If that fails, the table says so.
bench-gpu: dev $(BENCH)/trl/.installed
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[gpu]"
	@$(BENCH)/trl/bin/python -m pip install -qq bitsandbytes liger-kernel
	-@$(BENCH)/trl/bin/python -m pip install -qq 'kernels>=0.18.2,<0.19'
	-@$(BENCH)/trl/bin/python -c 'from transformers.integrations.hub_kernels import load_and_register_attn_kernel as fetch; fetch("kernels-community/flash-attn2")'
	@$(BIN)/python benchmarks/gpu.py
	@$(BIN)/python benchmarks/memory.py --gpu $(BENCH_DATA)

# BUDGET sets the time in seconds. TRL is measured too if `make bench-gpu` has created its environment.
check-gpu: dev
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[gpu]"
	@$(BIN)/python benchmarks/gpu_check.py --seconds $(or $(BUDGET),240)

test: dev
	$(BIN)/python -m pytest $(SPREAD)

test-slow: dev
	$(BIN)/python -m pytest $(SPREAD) -m slow

test-gpu: dev
	$(BIN)/python -m pytest -m gpu

# kernels/cpu is optional: the tests that could miss it without that folder, on a copy of the tree.
WITHOUT_CPU := tests/kernels tests/models tests/memory tests/engine tests/generation tests/flows
test-without-cpu-kernels: dev
	@rm -rf build/without-cpu-kernels && mkdir -p build/without-cpu-kernels
	@git ls-files -z src tests docs examples README.md CONTRIBUTING.md Makefile pyproject.toml | xargs -0 cp --parents -t build/without-cpu-kernels
	@rm -r build/without-cpu-kernels/src/xtuner/kernels/cpu
	cd build/without-cpu-kernels && PYTHONPATH=$(CURDIR)/build/without-cpu-kernels/src $(CURDIR)/$(BIN)/python -m pytest $(SPREAD) $(WITHOUT_CPU)
	@rm -rf build/without-cpu-kernels

# What needs no torch (settings, calls, migration) on other versions of Python, where they are installed.
WITHOUT_TORCH := tests/config tests/calls tests/migrate/test_yaml_files.py tests/migrate/test_read_mmengine.py
WITHOUT_TORCH += tests/cli/test_list_cfg.py tests/cli/test_copy_cfg.py tests/cli/test_explain.py
test-python:
	@for version in 3.12 3.13; do \
		for python in python$$version $$HOME/.pyenv/versions/$$version.*/bin/python; do \
			$$python -c "" 2>/dev/null && break; python=; done; \
		if [ -z "$$python" ]; then echo "Python $$version: not installed, skipped"; continue; fi; \
		echo "Python $$version: $$python" && rm -rf build/python$$version && $$python -m venv build/python$$version && \
		build/python$$version/bin/python -m pip install -qq -c constraints.txt pydantic typer rich pyyaml jinja2 pytest pytest-timeout && \
		PYTHONPATH=$(CURDIR)/src build/python$$version/bin/python -m pytest --noconftest -p no:cacheprovider $(WITHOUT_TORCH) && \
		rm -rf build/python$$version || exit 1; \
	done

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(SPREAD)

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: dev
	$(BIN)/python -m xtuner.config.explain > docs/settings.md

clean:
	rm -rf .venv build dist quickstart quickstart-llava quickstart-tools .pytest_cache .mypy_cache .ruff_cache
