# make demo   what EasyRef does, shown on this machine
# make test   every test; the host tests run once for each ComfyUI found (COMFYUI_PATH, ~/comfy/ComfyUI*)
# Both need only python3 (3.11 or newer) and the package index: they set up .venv themselves.

PYTHON ?= python3

.PHONY: setup demo test

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@.venv/bin/python tools/demo.py

test: setup
	@.venv/bin/python tools/run_tests.py
