"""The memory command: python -m bench.memory simplenet"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("bench.memory")

import argparse
import contextlib
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

import models
from bench.conditions import conditions
from bench.measure.nvml import GpuMemory, NvmlUnavailable, gpu_memory
from bench.measure.tracker import CATEGORIES, INPUT, WORKSPACE, Tracker
from train import writeup
from train.cli import Parser, UserError, number, run_command
from train.files import write_json

MIB = 2**20
NUM_CLASSES = 100
LABEL = "predicted (accounted on meta tensors; no allocator slack, no CUDA context)"

# convolution -> why its peak and the ratio made of it are lower bounds.
LOWER_BOUNDS = {
    "triton": "≥: at least. Triton's launchers do not run on meta tensors, so their split-K workspaces are not "
    "included; cuDNN's are in no column either.",
}

DESCRIPTION = """\
Account for the memory of one training step: forward, loss, backward and SGD with momentum, in float32, the second
step of two, so that the optimizer's state exists. The step runs on meta tensors, which have sizes and no bytes: it
needs neither the memory nor a GPU. Where there is a GPU, the real step runs on it too, each convolution in a process
of its own, and the driver's figure (NVML) stands beside the prediction.
"""

EXAMPLES = """
examples:
  python -m bench.memory simplenet                      all, batch 256, 128 px
  python -m bench.memory simplenet --conv torch triton --batch-size 64
  python -m bench.memory simplenet --json memory.json   in bytes, for programs
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One training step to account for."""

    model: str
    """One of models.MODELS."""
    conv: str
    """One of models.CONVOLUTIONS."""
    batch_size: int
    """Images a step."""
    image_size: int
    """Side of the images in pixels."""


def run_step(step: Step, device: torch.device, tracker: Tracker | None = None) -> None:
    """Runs the step twice on `device`; the tracker's peak is the second one's."""
    with device:
        model = models.build(step.model, conv=step.conv, num_classes=NUM_CLASSES, image_size=step.image_size)
        x = torch.zeros(step.batch_size, 3, step.image_size, step.image_size)
        x = x.contiguous(memory_format=models.memory_format(step.conv))
        y = torch.zeros(step.batch_size, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if tracker is not None:
        tracker.watch(model, optimizer)
        tracker.label((x, y), INPUT)
    with tracker or contextlib.nullcontext():
        for _ in range(2):
            if tracker is not None:
                tracker.reset_peak()
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()


def account(step: Step, device: str = "meta") -> Tracker:
    """The accounts of the step: on meta tensors a prediction for a GPU, on the CPU what it takes there."""
    tracker = Tracker(device)
    run_step(step, tracker.device, tracker)
    return tracker


def measure(step: Step) -> dict[str, int | str | None]:
    """The real step on the first GPU, in a fresh process, so that the figure holds one CUDA context and one model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_here, (step,))


def _measure_here(step: Step) -> dict[str, int | str | None]:
    device = torch.device("cuda", 0)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    before = gpu_memory(uuid).used  # NVML needs no CUDA context of this process, so this is all others'
    try:
        run_step(step, device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    after = gpu_memory(uuid)
    if after.process is not None:
        source, nbytes = "NVML, this process", after.process
    else:
        source, nbytes = "NVML, growth of the device's use", after.used - before
    return {
        "source": source,
        "nbytes": nbytes,
        "allocated_peak": torch.cuda.max_memory_allocated(device),
        "reserved_peak": torch.cuda.max_memory_reserved(device),
    }


def find_gpu() -> GpuMemory:
    """The GPU the real step can run on; raises NvmlUnavailable with the reason where there is none."""
    gpu = gpu_memory()
    if not torch.cuda.is_available():
        raise NvmlUnavailable(f"NVML shows {gpu.name}, but this PyTorch cannot use it")
    return gpu_memory(str(torch.cuda.get_device_properties(0).uuid))


def writeup_mib(model: str, conv: str) -> int | None:
    """What nvidia-smi showed the write-up for this model with this convolution, on its Tesla T4."""
    theirs = writeup.figures_for(model, conv, fine_tuned=True)  # a fine-tuned network takes what a new one does
    return theirs.mib if theirs and theirs.conv == conv else None


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.memory",
        usage="python -m bench.memory MODEL [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    convolutions = list(models.CONVOLUTIONS)
    add("model", choices=list(models.MODELS), help="whose training step")
    add("--conv", nargs="+", choices=convolutions, default=convolutions, help="convolutions (default: all)")
    add("--batch-size", type=number(int, above=0), default=writeup.BATCH_SIZE, metavar="N", help="images a step (256)")
    add("--image-size", type=number(int, least=8), default=writeup.IMAGE_SIZE, metavar="N", help="side in pixels (128)")
    add("--json", type=Path, metavar="FILE", help="write the figures, in bytes, into FILE too")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    steps = [
        Step(model=arguments.model, conv=conv, batch_size=arguments.batch_size, image_size=arguments.image_size)
        for conv in dict.fromkeys(arguments.conv)
    ]
    if steps[0].batch_size * steps[0].image_size**2 > 2**48:
        raise UserError(f"{steps[0].batch_size} images of {steps[0].image_size} px are beyond any machine")
    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder; name a file")
    try:
        gpu, reason = find_gpu(), None
    except NvmlUnavailable as error:
        gpu, reason = None, str(error)
    try:
        accounts = {step.conv: account(step) for step in steps}
    except ValueError as error:  # the model does not take such images, or one alone
        raise UserError(f"{arguments.model}, {arguments.batch_size} images a step: {error}") from error
    measured = {step.conv: measure(step) for step in steps} if gpu else {}
    report = make_report(steps, accounts, measured, gpu, reason)
    if arguments.json is not None:
        write_json(arguments.json, report)
    print_report(Console(highlight=False), report)


def make_report(
    steps: list[Step],
    accounts: dict[str, Tracker],
    measured: dict[str, dict],
    gpu: GpuMemory | None,
    reason: str | None,
) -> dict:
    """What --json holds and the console shows; sizes in bytes."""
    first = steps[0]
    as_writeup = (first.batch_size, first.image_size) == (writeup.BATCH_SIZE, writeup.IMAGE_SIZE)
    reference = accounts["torch"].peak if "torch" in accounts else None
    return {
        "model": first.model,
        "batch_size": first.batch_size,
        "image_size": first.image_size,
        "num_classes": NUM_CLASSES,
        "dtype": "float32",
        "optimizer": "SGD, momentum 0.9",
        "label": LABEL,
        "convolutions": {
            conv: {
                "peak": tracker.peak,
                "is_lower_bound": conv in LOWER_BOUNDS,
                "at_peak": tracker.at_peak | ({WORKSPACE: None} if conv in LOWER_BOUNDS else {}),
                "ratio_to_torch": round(tracker.peak / reference, 4) if reference else None,
                "measured": measured.get(conv),
                "writeup_nvidia_smi_mib": writeup_mib(first.model, conv) if as_writeup else None,
            }
            for conv, tracker in accounts.items()
        },
        "gpu": gpu.name if gpu else None,
        "no_gpu_because": reason,
        "notes": [LOWER_BOUNDS[conv] for conv in accounts if conv in LOWER_BOUNDS],
        "conditions": conditions(torch.device("cuda", 0) if gpu else torch.device("cpu")),
    }


def print_report(console: Console, report: dict) -> None:
    entries = report["convolutions"]
    console.print(
        f"[bold]{report['model']}[/bold]: MiB at the peak of a training step, batch {report['batch_size']}, "
        f"{report['image_size']} px, {report['dtype']}, {report['optimizer']}"
    )
    console.print(report["label"])
    table = Table(box=box.SIMPLE_HEAD, show_footer=False)
    table.add_column("at the peak")
    for conv in entries:
        table.add_column(conv, justify="right")
    for category in CATEGORIES:
        table.add_row(category, *(mib(entry["at_peak"][category]) for entry in entries.values()))
    table.add_section()
    peaks = [bounded(entry, mib(entry["peak"])) for entry in entries.values()]
    table.add_row("peak, all together", *peaks, style="bold")
    if "torch" in entries:
        ratios = [bounded(entry, f"{entry['ratio_to_torch']:.2f}") for entry in entries.values()]
        table.add_row("times torch's", *ratios)
    if report["gpu"]:
        table.add_section()
        table.add_row("measured here by NVML", *(measured_cell(entry["measured"]) for entry in entries.values()))
    theirs = [entry["writeup_nvidia_smi_mib"] for entry in entries.values()]
    if any(theirs):
        table.add_section()
        table.add_row("the write-up's T4*", *(f"{figure:,}" if figure else "-" for figure in theirs), style="dim")
    console.print(table)
    for note in report["notes"]:
        console.print(note)
    if any(theirs):
        console.print(
            "* the write-up's own nvidia-smi reading of its whole process: allocator slack, CUDA context and "
            "libraries included, so not comparable with the rows above"
        )
    if report["gpu"]:
        sources = {entry["measured"].get("source") for entry in entries.values()} - {None}
        console.print(f"measured on {report['gpu']}: {'; '.join(sorted(sources)) or 'nothing fitted'}")
    else:
        console.print(f"no measured figure: {report['no_gpu_because']}")


def mib(nbytes: int | None) -> str:
    return "not known" if nbytes is None else f"{nbytes / MIB:,.1f}"


def bounded(entry: dict, figure: str) -> str:
    return f"≥ {figure}" if entry["is_lower_bound"] else figure


def measured_cell(measured: dict) -> str:
    return measured.get("error") or mib(measured["nbytes"])


if __name__ == "__main__":
    main()
