"""What a measurement is worth nothing without: where, with which versions, of which commit."""

import dataclasses
from typing import Any

import torch

from bench.measure.nvml import NvmlUnavailable, gpu_conditions
from train.report import device_name, git_commit, versions


def conditions(device: torch.device) -> dict[str, Any]:
    """Device, PyTorch's threads, versions and commit of a measurement on `device`, as plain types.

    Of a GPU also `gpu_state`.

    NumPy's BLAS, by which Triton's interpreter multiplies, has threads of its own: OPENBLAS_NUM_THREADS.
    """
    return {
        "device": device_name(device),
        **({"gpu": gpu_state(device)} if device.type == "cuda" else {}),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": git_commit(),
    }


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Driver, clocks, power, heat and what holds clocks down just now, by NVML; or why that is not known."""
    try:
        return dataclasses.asdict(gpu_conditions(str(torch.cuda.get_device_properties(device).uuid)))
    except NvmlUnavailable as reason:
        return {"unavailable": str(reason)}
