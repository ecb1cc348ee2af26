# make demo | make test | make lint | make docs | make soak | make clean. Each installs the CPU runtime into .venv first,
# once.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/vllm-hlwq-ready

.PHONY: demo test lint docs soak clean

demo: $(READY)
	$(VENV)/bin/python examples/demo.py

test: $(READY)
	$(VENV)/bin/python -m pytest -q

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/mkdocs build --strict

# Half an hour of load by default, and a few minutes for servers to start and to be ended in mid-stream.
SOAK_MINUTES ?= 30
soak: $(READY)
	timeout $$(( $(SOAK_MINUTES) * 60 + 1800 )) $(VENV)/bin/python benchmarks/soak.py --minutes $(SOAK_MINUTES)

$(READY): scripts/setup_cpu.py pyproject.toml
	$(PYTHON) scripts/setup_cpu.py --venv $(VENV)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
