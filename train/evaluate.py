"""The evaluating command: python -m train.evaluate runs/simplenet-triton-20260102-030405"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("train.evaluate")

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

import models
from train.batches import val_batches
from train.checkpoint import checkpoint_file, load_model, require_same_model
from train.cli import Parser, UserError, number, run_command
from train.data import FASHION_MINI, FASHION_MNIST, Dataset, load_data
from train.devices import one_thread, pick_device
from train.files import write_json
from train.loop import AMP_DTYPES, autocast, predict
from train.meter import Meter
from train.report import backend_of, describe_backend, describe_top5, device_name, git_commit, versions

DESCRIPTION = """\
Judge a checkpoint on validation images: top-1, top-5, loss, and a table by class that says what each class is most
often taken for.
"""

EXAMPLES = """
examples:
  python -m train.evaluate runs/simplenet-triton-20260102-030405
                                     its best epoch, on its own data
  python -m train.evaluate runs/a/last.pt --conv torch --json result.json
                                     its last one, by PyTorch's convolution
  python -m train.evaluate best.pt --data ~/flowers --flip-tta
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a model makes of a set of images."""

    loss: float
    """Mean cross-entropy, without label smoothing."""
    top1: float
    """Percent, as is top5."""
    top5: float
    confusion: Tensor
    """(classes, classes) int64 on the CPU: images of class [row] taken for class [column]."""


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset, *, image_size: int, batch_size: int, device: torch.device,
    memory_format: torch.memory_format, amp: str = "off", flip: bool = False, console: Console | None = None,
) -> Result:
    """Runs `model`, in eval mode on `device`, over all of `data`; a terminal `console` shows a bar meanwhile."""
    classes = len(data.classes)
    meter = Meter(classes, device)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    batches = track(
        val_batches(data, batch_size=batch_size, image_size=image_size, device=device, memory_format=memory_format),
        "evaluating", total=-(-len(data) // batch_size), transient=True,
        console=console, disable=console is None or not console.is_terminal,
    )
    for x, y in batches:
        with autocast(device, amp):
            logits = predict(model, x, flip=flip)
        meter.update(logits, y, F.cross_entropy(logits, y))
        confusion += multiclass_confusion_matrix(logits, y, classes, validate_args=False)
    loss, top1, top5 = meter.compute()
    return Result(loss=loss, top1=top1, top5=top5, confusion=confusion.cpu())


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train.evaluate",
        usage="python -m train.evaluate CHECKPOINT [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    whole = number(int, above=0)
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt file of a run, or the run folder (its best.pt)")
    add("--data", metavar="fashion-mini|fashion-mnist|PATH", help="images of the same classes (default: its own)")
    add("--conv", choices=list(models.CONVOLUTIONS), help="which convolution computes it (default: as it was trained)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (default: auto, the GPU if any)")
    add("--batch-size", type=whole, default=256, metavar="N", help="images a batch (256)")
    add("--limit-val", type=whole, metavar="N", help="use only N images, evenly over the classes (default: all)")
    add("--flip-tta", action=argparse.BooleanOptionalAction,
        help="the mean of an image's logits and its mirror image's (default: as it was validated)")
    add("--amp", choices=list(AMP_DTYPES), help="automatic mixed precision (default: as it was validated)")
    add("--json", type=Path, metavar="FILE", help="write the figures and the confusion matrix into FILE too")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder; name a file")
    device = pick_device(arguments.device)
    path = checkpoint_file(arguments.checkpoint)
    model, saved = load_model(path, conv=arguments.conv, device=device)
    settings = saved["settings"]
    conv = arguments.conv or settings["conv"]
    flip = settings["flip_tta"] if arguments.flip_tta is None else arguments.flip_tta
    amp = arguments.amp or settings["amp"]
    backend = backend_of(conv, device)
    data = load_val(arguments, settings, console)
    require_same_model(path, saved, settings["model"], data.classes)
    try:
        with one_thread(backend):
            result = evaluate(
                model, data, image_size=settings["image_size"], batch_size=arguments.batch_size, device=device,
                memory_format=models.memory_format(conv), amp=amp, flip=flip, console=console,
            )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"not enough GPU memory for {arguments.batch_size} images of {settings['image_size']} px; "
            "take a smaller --batch-size"
        ) from error
    report = {
        "checkpoint": str(path),
        "epoch": saved["epoch"],
        "model": settings["model"],
        "conv": conv,
        "backend": backend,
        "device": device_name(device),
        "data": data.name,
        "image_size": settings["image_size"],
        "flip_tta": flip,
        "amp": amp,
        "images": len(data),
        "loss": result.loss,
        "top1": result.top1,
        "top5": result.top5,
        "top5_counts": min(5, len(data.classes)),
        "classes": by_class(result.confusion, data.classes),
        "confusion": result.confusion.tolist(),
        "versions": versions(),
        "commit": git_commit(),
    }
    if arguments.json is not None:
        write_json(arguments.json, report)
    print_report(console, report)


def load_val(arguments: argparse.Namespace, settings: dict[str, Any], console: Console) -> Dataset:
    """The validation images, at the size the checkpoint was trained at."""
    source = arguments.data or settings["data"]
    if source not in (FASHION_MINI, FASHION_MNIST):
        source = str(Path(source).expanduser())
    _, val = load_data(
        source, settings["image_size"],
        limit_train=1,  # training images are not needed, and reading them all would take minutes
        limit_val=arguments.limit_val, console=console,
        cache=Path(settings["cache"]) if settings.get("cache") else None,
    )
    return val


def by_class(confusion: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row a class: its images, how many percent are right, and the class most of the others are taken for."""
    rows = []
    for label, (name, counts) in enumerate(zip(classes, confusion, strict=True)):
        images, right = int(counts.sum()), int(counts[label])
        wrong = counts.clone()
        wrong[label] = 0
        most = int(wrong.argmax())
        rows.append({
            "class": name,
            "images": images,
            "top1": 100 * right / images if images else None,
            "most_confused_with": classes[most] if wrong[most] else None,
            "confusions": int(wrong[most]),
        })
    return rows


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The table by class, best first, and under it, where a long table leaves one's eyes, the figures over all."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("class", overflow="fold")
    for header in ("images", "top-1"):
        table.add_column(header, justify="right")
    table.add_column("most often taken for", overflow="fold")
    for row in sorted(report["classes"], key=lambda row: -1 if row["top1"] is None else row["top1"], reverse=True):
        top1 = "-" if row["top1"] is None else f"{row['top1']:.1f}%"
        confused = f"{row['most_confused_with']} ({row['confusions']})" if row["confusions"] else "-"
        table.add_row(row["class"], str(row["images"]), top1, confused)
    console.print(table, "", sep="\n")

    how = [describe_backend(report["backend"], report["device"])]
    how += ["mean over mirror images"] if report["flip_tta"] else []
    how += [report["amp"]] if report["amp"] != "off" else []
    over_all = Table(box=box.ROUNDED, show_header=False, title=f"{report['model']}, {report['conv']} convolution")
    over_all.add_column(style="bold", no_wrap=True)
    over_all.add_column(overflow="fold")
    over_all.add_row("checkpoint", f"{report['checkpoint']}, epoch {report['epoch']}")
    over_all.add_row("data", f"{report['data']}, {report['images']:,} images, {report['image_size']} px")
    over_all.add_row("computed", ", ".join(how))
    over_all.add_row("top-1", f"{report['top1']:.2f}%")
    over_all.add_row("top-5", describe_top5(report["top5"], len(report["classes"])))
    over_all.add_row("loss", f"{report['loss']:.4f}")
    console.print(over_all)


if __name__ == "__main__":
    main()
