"""Lets ComfyUI and transformers import torchvision and torchaudio beside a CPU-only torch.

The package index has these two built for CUDA only: on a CPU build of torch, torchvision finds two of its
operators missing and torchaudio cannot load its library. Neither is used by EasyRef. Where both import as
they are, nothing is touched.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MISSING_OPERATORS = ("torchvision::nms", "torchvision::qnms")
TORCHAUDIO_MODULES = ("torchaudio", "torchaudio.functional", "torchaudio.transforms")


def complete_cpu_torch() -> None:
    """Make `import torchvision` and `import torchaudio` work; call it before the host is imported."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _forget("torchvision")
        _define_missing_operators()
        importlib.import_module("torchvision")
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError, RuntimeError):
        _forget("torchaudio")
        _put_empty_torchaudio()


def _forget(package: str) -> None:
    """Remove the modules of a failed import."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _define_missing_operators() -> None:
    from torch.library import define

    for name in MISSING_OPERATORS:
        define(name, "(Tensor a, Tensor b, float c) -> Tensor")


def _put_empty_torchaudio() -> None:
    """Put an empty stand-in for torchaudio into sys.modules, which can be imported."""
    for name in TORCHAUDIO_MODULES:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, loader=None, is_package=True)  # transformers looks for a spec
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
