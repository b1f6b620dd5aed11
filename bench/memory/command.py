"""The memory command: python -m bench.memory simplenet"""

import argparse
import dataclasses
import functools
import itertools

import torch
from rich.console import Console

import models
from bench.conditions import conditions
from bench.measure import at_hand, snapshot
from bench.measure.account import Account
from bench.measure.predict import GPUS, GpuKind, largest_batch, predict
from bench.memory import measured
from bench.memory.console import print_overview, print_report, print_traffic, print_traffic_overview
from bench.memory.figure import draw
from bench.memory.history import history
from bench.memory.live import follow
from bench.memory.report import Result, make_report
from bench.memory.traffic import make_report as make_traffic_report
from train import writeup
from train.cli import Parser, UserError, number, path, run_command
from train.files import atomic_write, write_json
from train.loop import AMP_DTYPES
from train.rehearsal import CONVOLUTIONS, NUM_CLASSES, STEPS, UNFUSED, Step, rehearse
from train.shortage import LEAST_IMAGES

ALL = "all"

DESCRIPTION = """\
Account for the memory of a training step (forward, loss, backward, the write-up's optimiser): by whom it is taken, for
what, and when. The step is predicted: it runs on meta tensors, which have sizes and no bytes, and what it takes and
frees is replayed through a model of PyTorch's allocator. Neither the memory nor a GPU is needed. Where there is a GPU,
the real step runs on it too, each convolution in a process of its own, and the driver's figures (NVML) stand beside.
With --traffic the bytes moved to and from that memory are counted instead, by kind of operator.
"""

EXAMPLES = """
examples:
  python -m bench.memory simplenet           all convolutions, batch 256, 128 px
  python -m bench.memory all                 all models, in one table
  python -m bench.memory resnet18 --conv torch triton --amp fp16 --gpu a100-40gb
  python -m bench.memory simplenet --fits t4            the largest batch
  python -m bench.memory simplenet --timeline step.png  over one step, a picture
  python -m bench.memory simplenet --conv unfold --snapshot step.pickle
                                 for https://pytorch.org/memory_viz (drag it in)
  python -m bench.memory simplenet --conv torch --live --batch-size 32
                              really trains here, and shows its memory meanwhile
  python -m bench.memory simplenet --traffic            bytes moved, and by whom
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
    add("model", choices=[*models.MODELS, ALL], help="whose training step")
    convolutions = (*CONVOLUTIONS, *models.VARIANTS)
    add("--conv", nargs="+", choices=convolutions, metavar="CONV",
        help=f"{', '.join(convolutions)} (default: the first {len(CONVOLUTIONS)})")
    add("--batch-size", type=whole, default=writeup.BATCH_SIZE, metavar="N", help="images a step (256)")
    add("--image-size", type=number(int, least=8), default=writeup.IMAGE_SIZE, metavar="N", help="side in pixels (128)")
    add("--amp", choices=list(AMP_DTYPES), default="off", help="automatic mixed precision (off)")
    add("--gpu", choices=list(GPUS), metavar="GPU", help=f"predict for this one: {kinds} (the one at hand, or t4)")
    add("--fits", choices=list(GPUS), metavar="GPU", help="predict for this one, and find the largest batch for it")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--predict", action="store_true", help="measure nothing (what happens anyway without a GPU)")
    how.add_argument("--live", action="store_true", help="train really, on the GPU or else the CPU, and follow it")
    add("--traffic", action="store_true", help="count instead what the step moves to and from DRAM at least")
    add("--steps", type=whole, metavar="N", help="steps that --live makes (10)")
    add("--timeline", type=path, metavar="FILE", help="draw live bytes over the step, a PNG")
    add("--snapshot", type=path, metavar="FILE", help="write the history of one --conv for PyTorch's memory viewer")
    add("--json", type=path, metavar="FILE", help="write the figures, in bytes, into FILE too")
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    check(arguments)
    names = list(models.MODELS) if arguments.model == ALL else [arguments.model]
    convolutions = dict.fromkeys(arguments.conv or CONVOLUTIONS)
    steps = [
        Step(
            model=name, conv=conv, batch_size=arguments.batch_size, image_size=arguments.image_size, amp=arguments.amp
        )
        for name in names
        for conv in convolutions
    ]
    for step in steps:
        require_model(step)
    console = Console(highlight=False)
    if arguments.live:
        live(console, arguments, steps[0])
    elif arguments.traffic:
        traffic(console, arguments, steps)
    else:
        report(console, arguments, steps)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what can be known to be wrong before anything is computed."""
    if arguments.batch_size * arguments.image_size**2 > 2**48:
        raise UserError(f"{arguments.batch_size} images of {arguments.image_size} px are beyond any machine")
    files = {flag: file for flag in ("json", "timeline", "snapshot") if (file := getattr(arguments, flag)) is not None}
    for flag, file in files.items():
        if file.is_dir():
            raise UserError(f"--{flag} {file} is a folder; name a file")
        if not file.parent.is_dir():
            raise UserError(f"--{flag} {file}: there is no folder {file.parent}")
        if any(file.absolute() == other.absolute() for name, other in files.items() if name != flag):
            raise UserError(f"--{flag} {file} would be written over by another of the files asked for")
    if arguments.gpu and arguments.fits and arguments.gpu != arguments.fits:
        raise UserError(f"--fits {arguments.fits} predicts for that GPU; leave out --gpu {arguments.gpu}")
    if arguments.traffic:
        for flag in ("live", "fits", "timeline", "snapshot"):
            if getattr(arguments, flag):
                raise UserError(f"--{flag} is of the memory taken, --traffic of the bytes moved; leave one out")
    for flag in ("live", "snapshot"):
        if getattr(arguments, flag) and len(set(arguments.conv or CONVOLUTIONS)) > 1:
            raise UserError(f"--{flag} is of one convolution; name it, as in --conv torch")
    for flag in ("live", "snapshot", "timeline"):
        if getattr(arguments, flag) and arguments.model == ALL:
            raise UserError(f"--{flag} is of one model; name it instead of {ALL}")
    if arguments.steps is not None and not arguments.live:
        raise UserError("--steps is for --live")
    if arguments.live:
        for flag in ("gpu", "fits", "timeline", "snapshot"):
            if getattr(arguments, flag):
                raise UserError(f"--{flag} is predicted; leave it out with --live")


def require_model(step: Step) -> None:
    """Raises UserError for a model that does not take such images, or so few a step, and for an unusable variant."""
    size = step.image_size
    with torch.device("meta"):
        try:
            model = models.build(step.model, step.conv.removesuffix(UNFUSED), NUM_CLASSES, size, fuse=False)
            model(torch.empty(step.batch_size, 3, size, size))
        except ValueError as error:
            raise UserError(f"{step.model}, {step.batch_size} images a step: {error}") from error


def live(console: Console, arguments: argparse.Namespace, step: Step) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    seen = follow(console, step, arguments.steps or 10, device)
    if arguments.json is not None:
        write_json(arguments.json, dataclasses.asdict(step) | seen | {"conditions": conditions(device)})


def gpu_at_hand() -> tuple[GpuKind | None, str | None]:
    """Or None, and why there is none."""
    try:
        return at_hand.find_gpu(), None
    except at_hand.NoGpu as error:
        return None, str(error)


def predicted_for(arguments: argparse.Namespace, found: GpuKind | None) -> GpuKind:
    named = arguments.fits or arguments.gpu
    return GPUS[named] if named else found or GPUS["t4"]


def traffic(console: Console, arguments: argparse.Namespace, steps: list[Step]) -> None:
    gpu = predicted_for(arguments, None if arguments.gpu else gpu_at_hand()[0])
    reports = []
    for model, of_model in itertools.groupby(steps, key=lambda step: step.model):
        with console.status(f"{model}, what its step moves"):
            reports.append(make_traffic_report(list(of_model), gpu))
    write_reports(arguments, reports)
    if len(reports) == 1:
        print_traffic(console, reports[0])
    else:
        print_traffic_overview(console, reports)


def report(console: Console, arguments: argparse.Namespace, steps: list[Step]) -> None:
    found, reason = (None, "--predict") if arguments.predict else gpu_at_hand()
    gpu = predicted_for(arguments, found)
    results: dict[str, dict[str, Result]] = {}
    for step in steps:
        with console.status(f"{step.model}, {step.conv} convolution"):
            account = rehearsed(step, gpu)
            results.setdefault(step.model, {})[step.conv] = Result(
                step=step,
                account=account,
                prediction=predict(account, gpu),
                measured=measured.measure(step) if found else None,
                largest_batch=find_largest(step, gpu) if arguments.fits else None,
            )
    reports = [make_report(of_model, gpu, found, reason) for of_model in results.values()]
    write_files(arguments, next(iter(results.values())), reports, gpu)
    if len(reports) == 1:
        print_report(console, reports[0])
    else:
        print_overview(console, reports)


def write_files(
    arguments: argparse.Namespace, results: dict[str, Result], reports: list[dict], gpu: GpuKind
) -> None:
    """--json of all reports, --timeline and --snapshot of the `results` of the only model."""
    title = f"{arguments.model}, batch {arguments.batch_size}, {arguments.image_size} px, {reports[0]['dtype']}"
    write_reports(arguments, reports)
    if arguments.timeline is not None:
        accounts = {conv: result.account for conv, result in results.items()}
        draw(arguments.timeline, accounts, f"{title}\npredicted, for one {gpu.name}")
    if arguments.snapshot is not None:
        (result,) = results.values()
        title = f"{title}, {result.step.conv} convolution, one {gpu.name}"
        with atomic_write(arguments.snapshot) as file:
            snapshot.write(file, history(result.account, gpu, title))


def write_reports(arguments: argparse.Namespace, reports: list[dict]) -> None:
    """--json"""
    if arguments.json is not None:
        write_json(arguments.json, reports[0] if len(reports) == 1 else {"reports": reports})


def rehearsed(step: Step, gpu: GpuKind) -> Account:
    return rehearse(step, gpu.arch, multiprocessors=gpu.multiprocessors, steps=STEPS)


def find_largest(step: Step, gpu: GpuKind) -> dict[str, int]:
    """Result.largest_batch"""

    @functools.cache
    def account_of(batch: int) -> Account:
        return rehearsed(dataclasses.replace(step, batch_size=batch), gpu)

    return {
        name: largest_batch(account_of, gpu, pessimistic=pessimistic, least=LEAST_IMAGES)
        for name, pessimistic in (("surely", True), ("perhaps", False))
    }
