"""Setup before any test is imported: paths, and torchvision on a CPU-only torch."""

import sys
from importlib.util import find_spec

from devkit.cpu_torch import complete_cpu_torch
from devkit.hosts import ROOT

sys.path.append(str(ROOT))  # last: this pack's `nodes` must not hide ComfyUI's nodes.py

# transformers imports it when it is there
if find_spec("torchvision"):
    complete_cpu_torch()
