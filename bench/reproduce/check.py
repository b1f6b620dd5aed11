"""The convolutions against nn.Conv2d, as the write-up checked its own: python -m bench.reproduce.check

Results and gradients in float64 for its three pairs of padding and stride, and PyTorch's gradcheck.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import models
from bench.conditions import conditions
from bench.reproduce.plan import WRITTEN
from train.cli import Parser, path, run_command
from train.devices import pick_device
from train.files import write_json
from train.report import backend_of

X_SHAPE, CHANNELS, FILTER = (2, 3, 12, 12), 64, 7
CASES = ((0, 1), (0, 3), (3, 3))
"""(padding, stride)"""
GRADCHECK = (3, 2)
EPS, ATOL = 1e-4, 1e-5
TOLERANCE = 1e-12
"""||result - nn.Conv2d's|| / ||nn.Conv2d's||, float64: some thousand roundings of 1e-16."""
TENSORS = ("result", "input gradient", "weight gradient", "bias gradient")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.reproduce.check",
        usage="python -m bench.reproduce.check [options]",
        description="Compare the unfolding and the Triton convolution with nn.Conv2d, in float64: results, gradients, "
        "and gradients against differences (gradcheck).",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (auto: a GPU if any)")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the figures into FILE too")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    """Exits 1 where a convolution is wrong."""
    device = pick_device(arguments.device)
    torch.set_num_threads(1)  # twelve pixels wide: more threads would only wait for each other
    report = check(device)
    if arguments.json is not None:
        write_json(arguments.json, report)
    show(Console(highlight=False), report)
    if wrong := wrongs(report):
        sys.stdout.flush()
        sys.exit(f"wrong: {'; '.join(wrong)}")


def wrongs(report: dict[str, Any]) -> list[str]:
    """What is above the tolerance, or no number, and gradchecks that failed, in words."""
    found = [
        f"{row['conv']}, padding {row['padding']}, stride {row['stride']}: {name} is off by {error:.1e}"
        for row in report["rows"]
        for name, error in row["errors"].items()
        if not error <= report["tolerance"]
    ]
    return found + [f"{conv}: gradcheck failed" for conv, one in report["gradcheck"].items() if one["failed"]]


def check(device: torch.device) -> dict[str, Any]:
    """As plain types."""
    rows = [
        {"conv": conv, "padding": padding, "stride": stride, "errors": errors(conv, padding, stride, device)}
        for conv in WRITTEN
        for padding, stride in CASES
    ]
    return {
        "x_shape": list(X_SHAPE), "channels": CHANNELS, "filter": FILTER, "dtype": "float64", "tolerance": TOLERANCE,
        "backends": {conv: backend_of(conv, device) for conv in WRITTEN}, "rows": rows,
        "gradcheck": {conv: gradcheck(conv, device) for conv in WRITTEN}, "conditions": conditions(device),
    }  # fmt: skip


def made(conv: str, padding: int, stride: int, device: torch.device) -> tuple[nn.Conv2d, torch.Tensor]:
    """The convolution and its input, the same values for every `conv`."""
    torch.manual_seed(0)
    module = models.CONVOLUTIONS[conv](X_SHAPE[1], CHANNELS, FILTER, stride=stride, padding=padding).double()
    x = torch.randn(X_SHAPE, dtype=torch.float64)
    return module.to(device), x.to(device).requires_grad_()


def errors(conv: str, padding: int, stride: int, device: torch.device) -> dict[str, float]:
    """||ours - nn.Conv2d's|| / ||nn.Conv2d's|| of each of TENSORS."""

    def tensors(of: str) -> list[torch.Tensor]:
        module, x = made(of, padding, stride, device)
        y = module(x)
        dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)).to(device)
        return [y, *torch.autograd.grad(y, (x, module.weight, module.bias), dy)]

    pairs = zip(TENSORS, tensors(conv), tensors("torch"), strict=True)
    return {name: ((ours - theirs).norm() / theirs.norm()).item() for name, ours, theirs in pairs}


def gradcheck(conv: str, device: torch.device) -> dict[str, Any]:
    """PyTorch's own, with the write-up's eps and atol; of Triton's along random directions alone, as its two launches
    for each of 10,336 derivatives would take minutes."""
    padding, stride = GRADCHECK
    fast = backend_of(conv, device) != "native"
    module, x = made(conv, padding, stride, device)

    def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    operands = (x, module.weight, module.bias)
    found: dict[str, Any] = {"padding": padding, "stride": stride, "eps": EPS, "atol": ATOL, "fast": fast}
    return found | {"derivatives": sum(map(torch.Tensor.numel, operands)), "failed": failure(
        lambda: torch.autograd.gradcheck(convolve, operands, eps=EPS, atol=ATOL, fast_mode=fast)
    )}  # fmt: skip


def failure(call: Callable[[], object]) -> str | None:
    """What gradcheck says where it fails, in one line."""
    try:
        call()
    except GradcheckError as error:
        return " ".join(str(error).split())
    return None


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="largest relative error against nn.Conv2d, float64")
    table.add_column("conv")
    for name in ("padding, stride", *TENSORS):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        numbers = (f"{row['errors'][name]:.1e}" for name in TENSORS)
        table.add_row(row["conv"], f"{row['padding']}, {row['stride']}", *numbers)
    console.print(table)
    for conv, found in report["gradcheck"].items():
        how = "along random directions" if found["fast"] else "each by itself"
        outcome = found["failed"] or "passed"
        written = f"gradcheck, {conv} ({report['backends'][conv]})"
        console.print(f"{written}: {found['derivatives']:,} derivatives {how}: {outcome}")


if __name__ == "__main__":
    main()
