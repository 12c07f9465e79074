# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs; the second call skips that.
PYTHON ?= python3
BIN := .venv/bin
# What the environment is made from; when one of these changes it is made again.
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test lint clean

demo: .venv/demo.done
	rm -rf demo
	$(BIN)/snowmelt train builtin:digits --for 110s --out demo/digits
	@echo
	@echo "New digits, one row per class:           demo/digits/grid.png"
	@echo "Pictures melting out of noise:           demo/digits/strip.png"
	@echo "What the run saw and how it went:        demo/digits/report.md"
	@echo "Now with pictures of your own:           $(BIN)/snowmelt train YOUR-FOLDER --for 20m --out runs/mine"

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.done: .venv/bin/python $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev.done: .venv/bin/python $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo.done
