"""What a measurement is worth nothing without: where, with which versions, of which commit."""

from typing import Any

import torch

from train.report import device_name, git_commit, versions


def conditions(device: torch.device) -> dict[str, Any]:
    """Device, PyTorch's threads, versions and commit of a measurement on `device`, as plain types.

    NumPy's BLAS, by which Triton's interpreter multiplies, has threads of its own: OPENBLAS_NUM_THREADS.
    """
    return {
        "device": device_name(device),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": git_commit(),
    }
