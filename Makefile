# make demo   what EasyRef does, shown on this machine
# make test   every test; the host tests run once for each ComfyUI found (COMFYUI_PATH, ~/comfy/ComfyUI*)
# make tiny   trains the tiny model that ships with the pack again, from nothing (about an hour on two cores)
# All need only python3 (3.10 or newer) and the package index: they set up .venv themselves.

PYTHON ?= python3

.PHONY: setup demo test tiny

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@.venv/bin/python tools/demo.py

test: setup
	@.venv/bin/python tools/run_tests.py

tiny: setup
	@.venv/bin/python tools/train_tiny.py
