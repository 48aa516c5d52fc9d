# make demo   what EasyRef does, shown on this machine
# make quick  lint, types and the fast tests of the core, for each commit (less than a minute on two cores)
# make test   the tests in the first ComfyUI found (COMFYUI_PATH, ~/comfy/ComfyUI*), and in each further one those that depend
#             on its version; make test-all also the thorough ones, and every one in every ComfyUI, before a release
# make tiny   trains the tiny model of the shapes, from nothing (about an hour on two cores)
# All need only python3 (3.10 or newer) and the package index: they set up .venv themselves.

PYTHON ?= python3

.PHONY: setup demo quick test test-all tiny

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@.venv/bin/python tools/demo.py

quick: setup
	@.venv/bin/python tools/run_tests.py --quick

test: setup
	@.venv/bin/python tools/run_tests.py

test-all: setup
	@.venv/bin/python tools/run_tests.py --all

tiny: setup
	@.venv/bin/python tools/train_tiny.py
