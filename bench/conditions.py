"""What a measurement is worth nothing without: where, with which versions, of which commit."""

import importlib.metadata
import platform
from typing import Any

import torch

from train.report import device_name, git_commit


def conditions(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit of a measurement on `device`, as plain types."""
    return {
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": importlib.metadata.version("triton"),
            "cuda": torch.version.cuda,
        },
        "commit": git_commit(),
    }
