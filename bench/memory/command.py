"""The memory command: python -m bench.memory simplenet"""

import argparse
import dataclasses
import functools
from pathlib import Path

import torch
from rich.console import Console

import models
from bench.conditions import conditions
from bench.measure import snapshot
from bench.measure.account import Account
from bench.measure.nvml import GpuMemory, NvmlUnavailable
from bench.measure.predict import GPUS, MIB, GpuKind, largest_batch, predict
from bench.memory import measured
from bench.memory.console import print_report
from bench.memory.figure import draw
from bench.memory.history import history
from bench.memory.live import follow
from bench.memory.report import Result, make_report
from bench.memory.step import Step, rehearse
from train import writeup
from train.cli import Parser, UserError, number, path, run_command
from train.files import write_json
from train.loop import AMP_DTYPES

STEPS = 3
"""Steps that are rehearsed: the optimiser's state comes with the first, and the allocator settles with the second."""

DESCRIPTION = """\
Account for the memory of a training step (forward, loss, backward, the write-up's optimiser): by whom it is taken, for
what, and when. The step is predicted: it runs on meta tensors, which have sizes and no bytes, and what it takes and
frees is replayed through a model of PyTorch's allocator. Neither the memory nor a GPU is needed. Where there is a GPU,
the real step runs on it too, each convolution in a process of its own, and the driver's figures (NVML) stand beside.
"""

EXAMPLES = """
examples:
  python -m bench.memory simplenet                      all, batch 256, 128 px
  python -m bench.memory resnet18 --conv torch triton --amp fp16 --gpu a100-40gb
  python -m bench.memory simplenet --fits t4            the largest batch
  python -m bench.memory simplenet --timeline step.png  over one step, a picture
  python -m bench.memory simplenet --conv unfold --snapshot step.pickle
                                 for https://pytorch.org/memory_viz (drag it in)
  python -m bench.memory simplenet --conv torch --live --batch-size 32
                              really trains here, and shows its memory meanwhile
  python -m bench.memory simplenet --json memory.json   in bytes, for programs
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.memory",
        usage="python -m bench.memory MODEL [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    whole, kinds = number(int, above=0), ", ".join(GPUS)
    add("model", choices=list(models.MODELS), help="whose training step")
    add("--conv", nargs="+", choices=list(models.CONVOLUTIONS), help="convolutions (default: all)")
    add("--batch-size", type=whole, default=writeup.BATCH_SIZE, metavar="N", help="images a step (256)")
    add("--image-size", type=number(int, least=8), default=writeup.IMAGE_SIZE, metavar="N", help="side in pixels (128)")
    add("--amp", choices=list(AMP_DTYPES), default="off", help="automatic mixed precision (off)")
    add("--gpu", choices=list(GPUS), metavar="GPU", help=f"predict for this one: {kinds} (the one at hand, or t4)")
    add("--fits", choices=list(GPUS), metavar="GPU", help="predict for this one, and find the largest batch for it")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--predict", action="store_true", help="measure nothing (what happens anyway without a GPU)")
    how.add_argument("--live", action="store_true", help="train really, on the GPU or else the CPU, and follow it")
    add("--steps", type=whole, metavar="N", help="steps that --live makes (10)")
    add("--timeline", type=path, metavar="FILE", help="draw live bytes over the step, a PNG")
    add("--snapshot", type=path, metavar="FILE", help="write the history of one --conv for PyTorch's memory viewer")
    add("--json", type=path, metavar="FILE", help="write the figures, in bytes, into FILE too")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    convolutions = list(dict.fromkeys(arguments.conv or models.CONVOLUTIONS))
    steps = {
        conv: Step(
            model=arguments.model, conv=conv, batch_size=arguments.batch_size, image_size=arguments.image_size,
            amp=arguments.amp,
        )
        for conv in convolutions
    }
    check(arguments, steps)
    console = Console(highlight=False)
    try:
        live(console, arguments, steps) if arguments.live else report(console, arguments, steps)
    except ValueError as error:  # the model does not take such images, or one alone
        raise UserError(f"{arguments.model}, {arguments.batch_size} images a step: {error}") from error


def check(arguments: argparse.Namespace, steps: dict[str, Step]) -> None:
    """Raises UserError for what can be known to be wrong before anything is computed."""
    if arguments.batch_size * arguments.image_size**2 > 2**48:
        raise UserError(f"{arguments.batch_size} images of {arguments.image_size} px are beyond any machine")
    for flag in ("json", "timeline", "snapshot"):
        file: Path | None = getattr(arguments, flag)
        if file is not None and file.is_dir():
            raise UserError(f"--{flag} {file} is a folder; name a file")
        if file is not None and not file.parent.is_dir():
            raise UserError(f"--{flag} {file}: there is no folder {file.parent}")
    if arguments.gpu and arguments.fits and arguments.gpu != arguments.fits:
        raise UserError(f"--fits {arguments.fits} predicts for that GPU; leave out --gpu {arguments.gpu}")
    for flag in ("live", "snapshot"):
        if getattr(arguments, flag) and len(steps) > 1:
            raise UserError(f"--{flag} is of one convolution; name it, as in --conv torch")
    if arguments.steps is not None and not arguments.live:
        raise UserError("--steps is for --live")
    if arguments.live:
        for flag in ("gpu", "fits", "timeline", "snapshot"):
            if getattr(arguments, flag):
                raise UserError(f"--{flag} is predicted; leave it out with --live")


def live(console: Console, arguments: argparse.Namespace, steps: dict[str, Step]) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    (step,) = steps.values()
    seen = follow(console, step, arguments.steps or 10, device)
    if arguments.json is not None:
        write_json(arguments.json, dataclasses.asdict(step) | seen | {"conditions": conditions(device)})


def report(console: Console, arguments: argparse.Namespace, steps: dict[str, Step]) -> None:
    found, reason = None, "--predict"
    if not arguments.predict:
        try:
            found = measured.find_gpu()
        except NvmlUnavailable as error:
            reason = str(error)
    gpu = GPUS[arguments.fits or arguments.gpu] if arguments.fits or arguments.gpu else kind_of(found)
    results = {}
    for conv, step in steps.items():
        with console.status(f"{step.model}, {conv} convolution"):
            account = rehearsed(step, gpu)
            results[conv] = Result(
                step=step,
                account=account,
                prediction=predict(account, gpu),
                measured=measured.measure(step) if found else None,
                largest_batch=find_largest(step, gpu) if arguments.fits else None,
            )
    made = make_report(results, gpu, found, reason)
    title = f"{arguments.model}, batch {arguments.batch_size}, {arguments.image_size} px, {made['dtype']}"
    if arguments.json is not None:
        write_json(arguments.json, made)
    if arguments.timeline is not None:
        accounts = {conv: result.account for conv, result in results.items()}
        draw(arguments.timeline, accounts, f"{title}\npredicted, for one {gpu.name}")
    if arguments.snapshot is not None:
        (result,) = results.values()
        snapshot.write(arguments.snapshot, history(result.account, f"{title}, {result.step.conv} convolution"))
    print_report(console, made)


def rehearsed(step: Step, gpu: GpuKind) -> Account:
    return rehearse(step, gpu.arch, multiprocessors=gpu.multiprocessors, steps=STEPS)


def kind_of(found: GpuMemory | None) -> GpuKind:
    """The GPU at hand as a kind to predict for, or the write-up's T4."""
    if found is None:
        return GPUS["t4"]
    properties = torch.cuda.get_device_properties(0)
    arch = f"sm_{properties.major}{properties.minor}"
    total = found.total // MIB
    return GpuKind(name=found.name, arch=arch, multiprocessors=properties.multi_processor_count, total=total)


def find_largest(step: Step, gpu: GpuKind) -> dict[str, int]:
    """Result.largest_batch"""
    least = 2  # batch norms refuse one image alone

    @functools.cache
    def account_of(batch: int) -> Account:
        return rehearsed(dataclasses.replace(step, batch_size=batch), gpu)

    return {
        name: largest_batch(account_of, gpu, pessimistic=pessimistic, least=least)
        for name, pessimistic in (("surely", True), ("perhaps", False))
    }
