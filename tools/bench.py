"""`python -m easyref_core.bench` where torchvision does not fit a CPU build of torch (tests/cpu_torch.py); same options."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.cpu_torch import complete_cpu_torch

if __name__ == "__main__":
    complete_cpu_torch()
    from easyref_core.bench.__main__ import main

    sys.exit(main())
