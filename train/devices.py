"""Where a command computes: --device, PyTorch's threads beside the interpreter, and memory that runs out."""

import contextlib
import re
from collections.abc import Iterator

import torch

from train.cli import UserError


def pick_device(name: str) -> torch.device:
    """The device that --device names: "cpu", "cuda", or "auto", CUDA where there is a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    try:
        return torch.device(name)
    except RuntimeError as error:  # from a config.json written by hand
        raise UserError(f"no device is called {name!r}") from error


class OutOfMemory(Exception):
    """Memory ran out, a GPU's or the machine's, while the command did what `phase` names."""

    def __init__(self, phase: str):
        super().__init__(f"out of memory during {phase}")
        self.phase = phase


@contextlib.contextmanager
def telling_of_memory(phase: str) -> Iterator[None]:
    """A refusal of memory inside the block becomes OutOfMemory."""
    try:
        yield
    except RuntimeError as error:
        # CUDA itself, outside PyTorch's allocator, and the CPU's allocator have no exception of their own for it.
        if not re.search("out of memory|allocate memory", str(error), re.IGNORECASE):
            raise
        raise OutOfMemory(phase) from error


@contextlib.contextmanager
def needing_memory(purpose: str) -> Iterator[None]:
    """A refusal of memory inside the block becomes MemoryError "for ...", which commands tell in one line."""
    try:
        with telling_of_memory(purpose):
            yield
    except OutOfMemory as error:
        raise MemoryError(f"for {purpose}") from error


@contextlib.contextmanager
def one_thread(backend: str) -> Iterator[None]:
    """PyTorch on one thread while kernels are interpreted: a second one only takes the interpreter's core from it."""
    threads = torch.get_num_threads()
    if backend == "interpreter":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
