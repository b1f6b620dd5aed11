"""The report card: python -m bench.report_card"""

import argparse
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import models
from bench.measure.gpus import GPUS
from bench.report_card import console as shown
from bench.report_card.calibration import Calibration
from bench.report_card.calibration import read as read_calibration
from bench.report_card.card import DTYPES, FUSED, OPERATIONS, Row, row
from bench.report_card.figure import draw
from bench.report_card.report import compare, make_report, read_report
from bench.shapes import Layer, conv_layers, name_of
from kernels.geometry import ConvGeometry
from train import writeup
from train.cli import Parser, UserError, number, path, run_command
from train.files import write_json

DEFAULT_MODELS = ("simplenet", "customnet", "resnet18")
DEFAULT_ARCHS = ("sm_75", "sm_80", "sm_90")
MOST_BYTES = 2**40
"""Of one tensor of a layer, that any machine holds."""
MOST_TAPS = 2**22
"""Of all output rows or columns, whose pixels are looked at one by one."""

DESCRIPTION = """\
Compile the convolution kernels for GPUs that are not here, read their machine code, and tell what will go wrong:
spills, missing tensor cores, narrow loads, a loop full of address arithmetic, a grid that fills half the chip. A time
bound says which limit a kernel meets first: an upper bound on speed, uncalibrated. No GPU is needed or asked.
"""

EXAMPLES = """
examples:
  python -m bench.report_card                   SimpleNet, CustomNet, ResNet18
  python -m bench.report_card simplenet --arch sm_90 --op weight_grad
  python -m bench.report_card --shape 256,64,32,32,64,3,3,1,1 --arch sm_80
                         N,Ci,H,W,Co,R,S[,stride,padding]; one row: all of it
  python -m bench.report_card simplenet --json now.json --figure roofline.png
  python -m bench.report_card simplenet --against now.json        what changed
  python -m bench.report_card --calibration gpu.json   estimates, by that GPU
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.report_card",
        usage="python -m bench.report_card [MODEL ...] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    whole = number(int, above=0)
    archs = ", ".join(f"{arch} {gpu.name}" for arch, gpu in GPUS.items())
    add("models", nargs="*", type=model, metavar="MODEL", help=f"whose layers ({', '.join(DEFAULT_MODELS)})")
    add("--shape", action="append", type=shape, metavar="N,Ci,H,W,Co,R,S[,stride,padding]",
        help="a layer of your own, instead of the models' or besides those named; may be given again")
    add("--layer", nargs="+", metavar="NAME", help='of the models\' layers these alone, as "conv3x3-64"')
    add("--arch", nargs="+", choices=list(GPUS), default=list(DEFAULT_ARCHS), metavar="ARCH",
        help=f"GPUs: {archs} ({' '.join(DEFAULT_ARCHS)})")
    operations = (*OPERATIONS, *FUSED, *models.VARIANTS)
    add("--op", nargs="+", choices=operations, default=list(OPERATIONS), metavar="OP",
        help=f"operations: {', '.join(operations)} (the first {len(OPERATIONS)})")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["fp16"], help="what is multiplied (fp16)")
    add("--batch-size", type=whole, default=writeup.BATCH_SIZE, metavar="N", help="images, of models (256)")
    add("--image-size", type=number(int, least=8), default=writeup.IMAGE_SIZE, metavar="N", help="side in pixels (128)")
    add("--details", action="store_true", help="all figures of each row, as a single row has them anyway")
    add("--json", type=path, metavar="FILE", help="write all figures into FILE too")
    add("--figure", type=path, metavar="FILE", help="draw the rooflines, a PNG")
    add("--against", type=path, metavar="FILE", help="tell what changed since a --json of before")
    add("--calibration", type=path, metavar="FILE", help="estimate times, by what was measured on a GPU")
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    check(arguments)
    calibration = read_calibration(arguments.calibration) if arguments.calibration else None
    before = read_report(arguments.against) if arguments.against else None
    archs = list(dict.fromkeys(arguments.arch))
    if calibration and calibration.arch not in archs:
        raise UserError(
            f"--calibration {calibration.file} is of {calibration.gpu} ({calibration.arch}), and --arch is "
            f"{', '.join(archs)}"
        )
    console = Console(highlight=False)
    rows = list(compiled(console, arguments, layers_of(arguments), archs))
    report = make_report(rows, calibration)
    if arguments.json is not None:
        write_json(arguments.json, report)
    if arguments.figure is not None:
        draw(arguments.figure, rows)
    show(console, arguments, rows, calibration)
    if before is not None:
        shown.print_comparison(console, compare(report, before, arguments.against))


def show(console: Console, arguments: argparse.Namespace, rows: Sequence[Row], calibration: Calibration | None) -> None:
    if len(rows) > 1:
        shown.print_card(console, rows, calibration)
    if len(rows) == 1 or arguments.details:
        for each in rows:
            shown.print_details(console, each, calibration)


def compiled(
    console: Console, arguments: argparse.Namespace, layers: Sequence[Layer], archs: Sequence[str]
) -> Iterator[Row]:
    """The rows, with a bar while they are compiled."""
    wanted = [
        (arch, dtype, op, layer)
        for arch in archs
        for dtype in dict.fromkeys(arguments.dtype)
        for op in dict.fromkeys(arguments.op)
        for layer in layers
    ]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=len(wanted))
        for arch, dtype, op, layer in wanted:
            bar.update(task, description=f"{arch} {dtype} {op} {layer.name}")
            try:
                found = row(op, layer, *DTYPES[dtype], arch)
            except (ValueError, NotImplementedError) as error:
                if op not in models.VARIANTS:
                    raise
                # A layer that the variant does not take, or a kernel that does not tell its tile.
                raise UserError(f"{op} of {layer.name}: {error}") from error
            yield found
            bar.advance(task)


def layers_of(arguments: argparse.Namespace) -> list[Layer]:
    """Each geometry once, whichever models have it. Raises UserError for what no layer is."""
    layers = list(arguments.shape or [])
    names = arguments.models or ([] if arguments.shape else DEFAULT_MODELS)
    for name in dict.fromkeys(names):
        try:
            found = conv_layers(name, arguments.batch_size, arguments.image_size)
        except ValueError as error:
            raise UserError(f"{name}, {arguments.batch_size} images of {arguments.image_size} px: {error}") from error
        if not found:
            raise UserError(f"{name} has no convolution")
        layers += found
    if arguments.layer:
        known = list(dict.fromkeys(layer.name for layer in layers))
        if unknown := [name for name in arguments.layer if name not in known]:
            raise UserError(f"--layer {unknown[0]}: there is none; there are {', '.join(known)}")
        layers = [layer for layer in layers if layer.name in arguments.layer]
    return list({layer.geometry: layer for layer in layers}.values())


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what can be known to be wrong before anything is compiled."""
    for op in arguments.op:
        is_labs = op in (*OPERATIONS, *FUSED)
        if not is_labs and op in models.VARIANTS and (refusal := models.VARIANTS[op].refusal):
            raise UserError(f"--op {op}: {refusal}")
    written = {flag: file for flag in ("json", "figure") if (file := getattr(arguments, flag)) is not None}
    for flag, file in written.items():
        if file.is_dir():
            raise UserError(f"--{flag} {file} is a folder; name a file")
        if not file.parent.is_dir():
            raise UserError(f"--{flag} {file}: there is no folder {file.parent}")
    if len({file.absolute() for file in written.values()}) < len(written):
        raise UserError(f"--json and --figure would both be written into {arguments.json}")
    if arguments.batch_size * arguments.image_size**2 * 64 > MOST_BYTES:
        raise UserError(f"{arguments.batch_size} images of {arguments.image_size} px are beyond any machine")


def model(text: str) -> str:
    """An argparse type: a model's name."""
    if text not in models.MODELS:
        raise argparse.ArgumentTypeError(f"unknown model {text!r}; known: {', '.join(models.MODELS)}")
    return text


def shape(text: str) -> Layer:
    """An argparse type: N,Ci,H,W,Co,R,S[,stride,padding]."""
    parts = text.split(",")
    if not 7 <= len(parts) <= 9:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(parts)} numbers instead of 7 to 9")
    sizes, rest = [number(int, above=0)(part) for part in parts[:8]], parts[8:]
    N, Ci, H, W, Co, R, S, stride = (*sizes, 1)[:8]
    padding = number(int, least=0)(rest[0]) if rest else 0
    try:
        g = ConvGeometry.of((N, Ci, H, W), (Co, Ci, R, S), stride, padding)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    is_large = max(N * Ci * H * W, N * Co * g.P * g.Q, Co * Ci * R * S) * 8 > MOST_BYTES
    if is_large or max(g.P * R, g.Q * S) > MOST_TAPS:
        raise argparse.ArgumentTypeError(f"{text} is beyond any machine")
    return Layer(
        name=name_of(g.w_shape), x_shape=g.x_shape, w_shape=g.w_shape, stride=(stride, stride),
        padding=(padding, padding), dilation=(1, 1), groups=1,
    )  # fmt: skip
