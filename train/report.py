"""What a finished run leaves behind: summary.json, curves.png and the table at its end."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from kernels.runtime import backend_for
from models import NATIVE
from train.files import atomic_write, read_csv
from train.memory import describe as describe_memory
from train.recipes import Settings

PACKAGES = ("triton", "torchvision", "torchmetrics", "numpy")
TRAIN_COLOUR, VAL_COLOUR = "tab:blue", "tab:orange"


def backend_of(conv: str, device: torch.device) -> str:
    """Where a run's convolutions are computed: "compiled" or "interpreter" Triton, or "native" PyTorch operators.

    Raises RuntimeError where Triton can do neither.
    """
    return "native" if conv in NATIVE else backend_for(device)


def device_name(device: torch.device) -> str:
    """As its maker calls it: "NVIDIA H200", "CPU (AMD EPYC 7B13)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.machine()})"


def describe_backend(backend: str, device: str) -> str:
    return {
        "compiled": f"compiled on {device}",
        "interpreter": "interpreted on the CPU (Triton's interpreter)",
        "native": f"native PyTorch on {device}",
    }[backend]


def versions() -> dict[str, str | None]:
    """Of Python, of the packages that compute, and of the CUDA that PyTorch was built for, if any."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
    }


def git_commit() -> str | None:
    """The commit of the checkout these files are in, with "+changes" where it has any; None outside one."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # installed into somebody else's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def summarise(
    settings: Settings, device: torch.device, *, classes: int, train_images: int, val_images: int,
    last: dict[str, str], best: dict[str, Any], images_per_s: float, memory: dict[str, Any], processes: int,
) -> dict[str, Any]:
    """The contents of summary.json; `last` is the final row of metrics.csv, `memory` what MemoryAccount sums up."""
    return {
        "model": settings.model,
        "conv": settings.conv,
        "backend": backend_of(settings.conv, device),
        "fused": settings.conv == "triton" and settings.fuse,
        "device": device_name(device),
        "processes": processes,
        "data": settings.data,
        "classes": classes,
        "train_images": train_images,
        "val_images": val_images,
        "image_size": settings.image_size,
        "recipe": settings.recipe,
        "epochs": settings.epochs,
        "adversarial": adversarial_entry(settings),
        "val_top1": float(last["val_top1"]),
        "val_top5": float(last["val_top5"]),
        "val_top5_counts": min(5, classes),
        "best_val_top1": best["val_top1"],
        "best_epoch": best["epoch"],
        "images_per_s": round(images_per_s, 1),
        "memory": memory,
        "seed": settings.seed,
        "versions": versions(),
        "commit": git_commit(),
    }


def adversarial_entry(settings: Settings) -> dict[str, Any] | None:
    """The attack whose images were trained on, as summary.json has it; None of a run on images as they are."""
    if not settings.adversarial:
        return None
    return {
        "target": settings.adversarial,
        "steps": settings.adversarial_steps,
        "step_size": settings.adversarial_step_size,
        "epsilon": settings.adversarial_epsilon,
    }


def describe_attack(entry: dict[str, Any]) -> str:
    """Of `adversarial_entry`: "5 steps of 0.01, epsilon 0.1, least likely"."""
    steps = f"{entry['steps']} step{'s' if entry['steps'] > 1 else ''} of {entry['step_size']:g}"
    return f"{steps}, epsilon {entry['epsilon']:g}, {entry['target'].replace('_', ' ')}"


def describe_top5(top5: float, classes: int) -> str:
    """A top-5 accuracy in percent, and a word on it where it says nothing."""
    trivial = f"  (of {classes} classes the right one is always among five)" if classes <= 5 else ""
    return f"{top5:.2f}%{trivial}"


def print_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    table = Table(box=box.ROUNDED, show_header=False, title=f"{summary['model']}, {summary['conv']} convolution")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    fused = "; ReLU, max-pool and norm fused with them" if summary.get("fused") else ""  # earlier versions lack it
    table.add_row("convolutions", describe_backend(summary["backend"], summary["device"]) + fused)
    if attack := summary.get("adversarial"):  # which summaries of earlier versions lack
        table.add_row("adversarial training", describe_attack(attack))
    best = f"best {summary['best_val_top1']:.2f}%, epoch {summary['best_epoch']}"
    table.add_row("val top-1", f"{summary['val_top1']:.2f}%  ({best})")
    table.add_row("val top-5", describe_top5(summary["val_top5"], summary["classes"]))
    table.add_row("training speed", f"{summary['images_per_s']:,.1f} images/s")
    table.add_row("memory", describe_memory(summary["memory"]))
    table.add_row("run folder", str(folder))
    console.print(table)
    if summary["backend"] == "interpreter":
        console.print(
            "The interpreter shows that the kernels are right; its speed says nothing about theirs on a GPU.",
            highlight=False,
        )


def draw_curves(folder: Path, settings: Settings) -> None:
    with atomic_write(folder / "curves.png") as file:
        curves(folder, settings).savefig(file, format="png", dpi=110)


def curves(folder: Path, settings: Settings) -> Figure:
    """From the folder's two CSV files: top-1, top-5, learning rate, loss per step.

    The loss is the one that was minimised; its panel says so where label smoothing lifts it above the plain one.
    """
    epochs, steps = read_csv(folder / "metrics.csv"), read_csv(folder / "steps.csv")
    figure = Figure(figsize=(10, 7), layout="constrained")
    title = f"{settings.model}, {settings.conv} convolution, {settings.recipe} recipe, {Path(settings.data).name}"
    train_label = "train"
    if attack := adversarial_entry(settings):
        title += f"\nadversarial training ({describe_attack(attack)})"
        train_label = "train, adversarial images"
    figure.suptitle(title, parse_math=False)  # a folder's name may have any $
    (top1, top5), (rate, loss) = figure.subplots(2, 2)
    draw_accuracy(top1, epochs, "top1", "top-1 (%)", train_label)
    draw_accuracy(top5, epochs, "top5", "top-5 (%)", train_label)

    numbers = [int(row["step"]) for row in steps]
    rate.plot(numbers, [float(row["lr"]) for row in steps], color="tab:green")
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))

    draw_losses(loss, numbers, [float(row["loss"]) for row in steps])
    smoothing = settings.label_smoothing
    smoothed = f"\n(cross-entropy, label smoothing {smoothing:g})" if smoothing else ""
    loss.set(xlabel="step", ylabel=f"training loss{smoothed}", ylim=(0, None))
    for axes in (top1, top5, rate, loss):
        axes.grid(alpha=0.3)
    return figure


def draw_losses(axes: Axes, numbers: list[int], losses: list[float]) -> None:
    """The loss of each step and, where there are steps enough, its mean over the last fiftieth of their number."""
    window = len(losses) // 50
    faint = dict(alpha=0.35, linewidth=0.8) if window > 1 else {}
    axes.plot(numbers, losses, color=TRAIN_COLOUR, label="each step", **faint)
    if window > 1:
        smooth = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
        axes.plot(numbers, smooth, color=TRAIN_COLOUR, label=f"mean of {window}")
    axes.legend()


def draw_accuracy(axes: Axes, epochs: list[dict[str, str]], column: str, label: str, train_label: str) -> None:
    numbers = [int(row["epoch"]) for row in epochs]
    for part, colour, name in (("train", TRAIN_COLOUR, train_label), ("val", VAL_COLOUR, "val")):
        values = [float(row[f"{part}_{column}"]) for row in epochs]
        axes.plot(numbers, values, marker="o" if len(epochs) < 30 else None, color=colour, label=name)
    axes.set(xlabel="epoch", ylabel=label)
    if len(epochs) == 1:
        axes.set_ylim(0, 103)  # matplotlib would spread two points over the whole height
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend()
