"""What every test needs before it imports anything."""

from importlib.util import find_spec

from .cpu_torch import complete_cpu_torch

if find_spec(
    "torchvision"
):  # installed only together with a ComfyUI; transformers imports it when it is there
    complete_cpu_torch()
