"""Where a command computes: --device, and PyTorch's threads beside the interpreter."""

import contextlib
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
