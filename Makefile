# Everything runs in .venv, made on first use with the versions in constraints.txt.
#   make demo     train a small model on real text: dense, sparse, dense; run it again to continue
#   make test     all tests (no network once .venv is there)
#   make faults   kills, damaged files, full disks (as root: it mounts small disks), bad numbers, random input, a long run
#   make audit    known vulnerabilities of what constraints.txt names; without a network it says so and passes
#   make docs     the documentation with the API reference, into build/site
#   make aot      what compiles for GPUs that are not there, 150 MB; without it those tests skip
#   make lint     style, types, who imports whom       make format   apply the style
#   make clean    remove caches; runs/ and .venv stay

BIN := .venv/bin
DEMO_RUN ?= runs/demo
PYTEST_ARGS ?=
AOT := jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc nvidia-cuda-nvdisasm

.PHONY: demo test faults aot audit docs lint format clean
.DEFAULT_GOAL := demo

demo: .venv/.installed-demo
	$(BIN)/python -m train.demo --workdir=$(DEMO_RUN)

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' $(PYTEST_ARGS)

faults: .venv/.installed-test
	mkdir -p build
	FAULTS_LOG=build/faults.jsonl $(BIN)/python -m pytest -n 2 tests/faults tests/test_train_step_guard.py $(PYTEST_ARGS)
	$(BIN)/python -m pytest -n 2 -m slow --ignore=tests/faults $(PYTEST_ARGS)

# In a folder of their own: jax would look for a GPU with them in every process.
aot: .venv/.created pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target .venv/aot $(AOT)

audit: .venv/.installed-dev
	$(BIN)/python -m tests.audit

docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-cache

format: .venv/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.installed-%: pyproject.toml constraints.txt | .venv/.created
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

# Whether a Python will do is found out by running it: a name on the PATH may be a version manager's placeholder
# that only prints an error, and a system Python may lack ensurepip, without which there is no pip in .venv.
# `make PYTHON=/path/to/python3.12 ...` chooses one.
.venv/.created:
	@for python in "$(PYTHON)" python3.13 python3.12 python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python3; do \
	  if [ -n "$$python" ] && \
	     "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	    echo "making .venv with $$("$$python" --version)"; \
	    rm -rf .venv && "$$python" -m venv .venv && touch $@ && exit 0; \
	    exit 1; \
	  fi; \
	done; \
	echo "no Python >= 3.12 with ensurepip found; install one (on Debian also python3-venv), or say which:" >&2; \
	echo "  make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
