# Everything a newcomer types. `make demo` and `make test` need Python 3.11 or newer, pip and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
