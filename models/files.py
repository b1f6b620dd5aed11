"""Files of weights, read so that nothing in them is executed and nothing that has rotted is believed."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ZIP_MAGIC = b"PK\3\4"  # by which torch.load too knows a zip from what was written before PyTorch 1.6

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def is_plain(value: Any) -> bool:
    """Whether `value` is a dense tensor of real numbers, as weights are, with values of its own."""
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in REAL
        and not (value.is_nested or value.is_meta)
    )


def load_tensors(path: Path) -> Any:
    """What torch.save wrote into `path`, plain types and tensors, on the CPU; raises many things for what is none.

    torch.load does not compare the checksums that its zip files carry: a flipped bit would be another weight. Files
    from before PyTorch 1.6 are no zips and have none.
    """
    with open(path, "rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"checksum of {damaged}")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a strange file is, before it is refused
            return torch.load(file, map_location="cpu", weights_only=True)
