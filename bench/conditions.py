"""What a measurement is worth nothing without: where, with which versions, of which commit."""

from typing import Any

import torch

from train.report import device_name, git_commit, versions


def conditions(device: torch.device) -> dict[str, Any]:
    """Device, PyTorch's CPU threads, versions and commit of a measurement on `device`, as plain types."""
    return {
        "device": device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": git_commit(),
    }
