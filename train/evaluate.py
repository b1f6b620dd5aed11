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
from train import shortage
from train.batches import val_batches
from train.checkpoint import checkpoint_file, load_model, require_same_model, settings_of
from train.cli import Parser, UserError, make_console, number, path, run_command
from train.data import Dataset, load_val, shows_garments, source
from train.devices import OutOfMemory, needing_memory, one_thread, pick_device, telling_of_memory
from train.files import write_json
from train.folder import VAL_EVERY, is_split
from train.loop import AMP_DTYPES, autocast, layout, predict
from train.meter import Meter
from train.miniplaces import is_miniplaces
from train.rehearsal import Validation, step_of
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

--data takes what train.run takes, and PATH/val/<class>/*.jpg without a train.
Of a folder PATH/<class>/*.jpg only every fifth image is judged, those that
train.run would have kept for validation; to have all of them judged, call it
PATH/val and name PATH.
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
    add("checkpoint", type=path, metavar="CHECKPOINT", help="a .pt file of a run, or the run folder (its best.pt)")
    add("--data", type=source, metavar="fashion-mini|fashion-mnist|PATH",
        help="images of the same classes (default: its own)")
    add("--conv", choices=list(models.CONVOLUTIONS), help="which convolution computes it (default: as it was trained)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (default: auto, the GPU if any)")
    add("--batch-size", type=whole, default=256, metavar="N", help="images a batch (256)")
    add("--limit-val", type=whole, metavar="N", help="use only N images, evenly over the classes (default: all)")
    add("--flip-tta", action=argparse.BooleanOptionalAction,
        help="the mean of an image's logits and its mirror image's (default: as it was validated)")
    add("--amp", choices=list(AMP_DTYPES), help="automatic mixed precision (default: as it was validated)")
    add("--json", type=path, metavar="FILE", help="write the figures and the confusion matrix into FILE too")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    console = make_console()
    if arguments.json is not None:
        require_place(arguments.json)
    device = pick_device(arguments.device)
    file = checkpoint_file(arguments.checkpoint)
    with needing_memory(f"the weights of {file} on {device_name(device)}"):
        model, saved = load_model(file, conv=arguments.conv, device=device)
    typed = {
        name: value for name in ("data", "conv", "flip_tta", "amp")
        if (value := getattr(arguments, name)) is not None
    }
    settings = settings_of(file, saved, **typed, limit_val=arguments.limit_val)
    memory_format = layout(settings)
    backend = backend_of(settings.conv, device)
    data = load_val(
        settings.data, settings.image_size, limit=settings.limit_val, console=console,
        cache=Path(settings.cache) if settings.cache else None,
    )
    require_same_model(file, saved, settings.model, data.classes)
    try:
        with one_thread(backend), telling_of_memory("evaluation"):
            result = evaluate(
                model.to(memory_format=memory_format), data, image_size=settings.image_size,
                batch_size=arguments.batch_size, device=device, memory_format=memory_format, amp=settings.amp,
                flip=settings.flip_tta, console=console,
            )
    except OutOfMemory as error:
        step = step_of(settings, min(arguments.batch_size, len(data)))
        raise UserError(shortage.describe(step, device, settings, flag="--batch-size", work=Validation)) from error
    report = {
        "checkpoint": str(file),
        "epoch": saved["epoch"],
        "model": settings.model,
        "conv": settings.conv,
        "backend": backend,
        "device": device_name(device),
        "data": data.name,
        "split": split_of(data.name),
        "image_size": settings.image_size,
        "flip_tta": settings.flip_tta,
        "amp": settings.amp,
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


def require_place(file: Path) -> None:
    """Raises UserError where no file can take that name: before the evaluation, which may take long."""
    if file.is_dir():
        raise UserError(f"--json {file} is a folder; name a file")
    if not file.parent.is_dir():
        raise UserError(f"--json {file}: no folder {file.parent}")


def split_of(data: str) -> str | None:
    """What was taken of a folder that has no validation images of its own; None of any other source."""
    if shows_garments(data) or is_miniplaces(Path(data)) or not is_split(Path(data)):
        return None
    return f"every {VAL_EVERY}th image of each class"


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
    split = f" ({report['split']})" if report["split"] else ""
    over_all.add_row("data", f"{report['data']}, {report['images']:,} images{split}, {report['image_size']} px")
    over_all.add_row("computed", ", ".join(how))
    over_all.add_row("top-1", f"{report['top1']:.2f}%")
    over_all.add_row("top-5", describe_top5(report["top5"], len(report["classes"])))
    over_all.add_row("loss", f"{report['loss']:.4f}")
    console.print(over_all)


if __name__ == "__main__":
    main()
