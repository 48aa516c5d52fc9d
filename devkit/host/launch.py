"""Starts ComfyUI, also with a CPU build of torch: `python launch.py <ComfyUI folder> <its arguments>`."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the host's main.py as `python main.py` would."""
    host, arguments = Path(sys.argv[1]), sys.argv[2:]

    # This folder must leave sys.path: its server.py would hide the host's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from cpu_torch import complete_cpu_torch

    complete_cpu_torch()
    sys.path[0] = str(host)
    sys.argv = [str(host / "main.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
