"""The attacking command: python -m attacks.run sweep CHECKPOINT"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("attacks.run")

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import models
from attacks.sweep import WRITEUP, sweep
from train import writeup
from train.batches import val_batches
from train.checkpoint import checkpoint_file, load_model, require_same_model, settings_of
from train.cli import Parser, UserError, make_console, number, path, run_command
from train.data import load_val, source
from train.devices import one_thread, pick_device
from train.distributed import World, connect
from train.files import atomic_write, write_csv, write_json
from train.loop import layout
from train.meter import Meter
from train.report import backend_of, describe_backend, device_name, git_commit, versions

TARGETS = ("least_likely", "most_likely")
# Of a healthy network's input gradient less than this is exactly 0; more, and steps are not taken that should be.
MANY_ZEROS = 0.05

DESCRIPTION = "Attack a trained model by projected gradients, and tell whether what it withstands can be believed."

EXAMPLES = """
examples:
  python -m attacks.run sweep runs/simplenet-torch-20260102-030405
  python -m attacks.run sweep best.pt --data ~/miniplaces --limit 1000 --out out

sweep: top-1 and top-5 under six settings (10 or 50 steps of 0.01 or 0.1 in an
L-infinity ball of 0.1 or 10) and two targets. "least likely" lowers the loss of
the least confident label that is wrong, "most likely" raises that of the most
confident one, both chosen anew each step, so that the second may lead back to
the true class: more steps of it are not always a stronger attack. Sizes live in
normalised space, where 0.1 is about 5.7 grey levels of 255, and pixels are not
kept within their range.
What is done is kept: the same command goes on where it was interrupted.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m attacks.run",
        usage="python -m attacks.run sweep CHECKPOINT [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    whole = number(int, above=0)
    add("attack", choices=["sweep"], help="what to do: see below")
    add("checkpoint", type=path, metavar="CHECKPOINT", help="a .pt file of a run, or the run folder (its best.pt)")
    add("--data", type=source, metavar="fashion-mini|fashion-mnist|PATH",
        help="images of the same classes (default: the checkpoint's own)")
    add("--conv", choices=list(models.CONVOLUTIONS), help="which convolution computes it (default: as it was trained)")
    add("--limit", type=whole, metavar="N", help="attack only N validation images, evenly over the classes")
    add("--batch-size", type=whole, default=256, metavar="N", help="images a batch (256)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (default: auto, the GPU if any)")
    add("--out", type=path, metavar="DIR", help="for sweep.json, sweep.csv, sweep.png (default: beside the checkpoint)")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    with connect() as world:
        run_sweep(arguments, make_console(quiet=not world.is_main), world)


def run_sweep(arguments: argparse.Namespace, console: Console, world: World) -> None:
    device = world.device(pick_device(arguments.device).type)
    file = checkpoint_file(arguments.checkpoint)
    model, saved = load_model(file, conv=arguments.conv, device=device)
    typed = {name: value for name in ("data", "conv") if (value := getattr(arguments, name)) is not None}
    settings = settings_of(file, saved, **typed, limit_val=arguments.limit)
    data = load_val(
        settings.data, settings.image_size, limit=settings.limit_val, console=console,
        cache=Path(settings.cache) if settings.cache else None,
    )
    require_same_model(file, saved, settings.model, data.classes)
    folder = arguments.out or file.parent
    folder.mkdir(parents=True, exist_ok=True)

    backend = backend_of(settings.conv, device)
    conditions = {
        "attack": "L-infinity, epsilon in normalised space, pixels not clamped, no random start, float32",
        "checkpoint": str(file), "checkpoint_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "epoch": saved["epoch"], "model": settings.model, "conv": settings.conv, "backend": backend,
        "device": device_name(device), "processes": world.size, "data": settings.data, "images": len(data),
        "data_fingerprint": data.fingerprint, "classes": len(data.classes), "image_size": settings.image_size,
        "batch_size": arguments.batch_size, "versions": versions(), "commit": git_commit(),
    }
    tally = Tally.begun_or_new(folder / "sweep.part.json", conditions, len(data.classes), device)
    batches = val_batches(
        data, batch_size=arguments.batch_size, image_size=settings.image_size, device=device,
        memory_format=layout(settings),
    )
    model = model.to(memory_format=layout(settings))
    count = -(-len(data) // arguments.batch_size)
    try:
        with one_thread(backend), progress_bar(console) as progress:
            task = progress.add_task("batches attacked", total=count, completed=tally.batches)
            for done, (x, y) in enumerate(batches):
                if done < tally.batches:
                    continue
                mine = slice(world.rank, None, world.size)  # each process attacks its share of every batch
                tally.add(world.sum(attack_batch(model, x[mine], y[mine], len(data.classes))))
                if world.is_main:
                    tally.save()
                progress.update(task, completed=tally.batches)
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted after {tally.batches} of {count} batches; the same command goes on from {tally.file}"
        ) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"not enough GPU memory for {arguments.batch_size} images of {settings.image_size} px; "
            "take a smaller --batch-size"
        ) from error
    if not world.is_main:
        return
    report = conditions | {"clean": tally.clean(), "rows": tally.rows()}
    report["doubts"] = doubts(report)
    write_json(folder / "sweep.json", report)
    columns = ("num_steps", "step_size", "epsilon", "target", "top1", "top5", "zero_gradient")
    write_csv(folder / "sweep.csv", columns, report["rows"])
    with atomic_write(folder / "sweep.png") as png:
        bar_chart(report).savefig(png, format="png")
    tally.file.unlink(missing_ok=True)
    print_sweep(console, report)
    console.print(f"written: {', '.join(str(folder / f'sweep.{kind}') for kind in ('json', 'csv', 'png'))}")


# ---------------------------------------------------------------- counting

CELLS = [(setting, target) for setting in WRITEUP for target in TARGETS]


def attack_batch(model: torch.nn.Module, x: Tensor, y: Tensor, classes: int) -> Tensor:
    """(1 + len(CELLS), 5) float64: Meter's sums of the clean images, then of each cell, and sums of zero gradients."""
    sums = torch.zeros(1 + len(CELLS), 5, dtype=torch.float64, device=x.device)
    if not len(x):  # a process whose share of the last batch is none
        return sums
    meter = Meter(classes, x.device)
    with torch.no_grad():
        logits = model(x)  # in eval mode, as load_model gives it
    sums[0, :4] = meter.sums_of(logits, y, cross_entropy(logits, y))
    for target in TARGETS:
        for setting, swept in zip(WRITEUP, sweep(model, x, target, y, settings=WRITEUP), strict=True):
            row = sums[1 + CELLS.index((setting, target))]
            row[:4] = meter.sums_of(swept.logits, y, cross_entropy(swept.logits, y))
            row[4] = swept.zero_gradient.double().sum()
    return sums


@dataclass(slots=True)
class Tally:
    """What has been counted so far, and the file that keeps it while the sweep goes on."""

    file: Path
    key: str
    """Of everything that decides the figures: a part counted under another key is begun anew."""
    classes: int
    sums: Tensor
    batches: int = 0

    @classmethod
    def begun_or_new(cls, file: Path, conditions: dict[str, Any], classes: int, device: torch.device) -> "Tally":
        deciding = {name: value for name, value in conditions.items() if name not in ("checkpoint", "data", "commit")}
        key = json.dumps(deciding | {"settings": [asdict(setting) for setting in WRITEUP]}, sort_keys=True)
        tally = cls(file, key, classes, torch.zeros(1 + len(CELLS), 5, dtype=torch.float64, device=device))
        try:
            saved = json.loads(file.read_text())
            if saved["key"] == key:
                tally.sums += torch.tensor(saved["sums"], dtype=torch.float64, device=device)
                tally.batches = saved["batches"]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{file} is damaged; delete it to begin anew") from error
        return tally

    def add(self, sums: Tensor) -> None:
        self.sums += sums
        self.batches += 1

    def save(self) -> None:
        write_json(self.file, {"key": self.key, "batches": self.batches, "sums": self.sums.tolist()})

    def clean(self) -> dict[str, float]:
        return self._accuracies(0)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each cell: its setting, target, accuracies in percent, and the mean share of zero gradients."""
        return [
            asdict(setting) | {"target": target} | self._accuracies(i)
            | {"zero_gradient": (self.sums[i, 4] / self.sums[i, 3]).item()}
            for i, (setting, target) in enumerate(CELLS, start=1)
        ]

    def _accuracies(self, row: int) -> dict[str, float]:
        meter = Meter(self.classes, self.sums.device)
        meter.sums = self.sums[row, :4]
        _, top1, top5 = meter.compute()
        return {"top1": top1, "top5": top5}


# ---------------------------------------------------------------- can it be believed

def doubts(report: dict[str, Any]) -> list[str]:
    """Signs that an accuracy under attack is an artefact, in words; none of a healthy model.

    After Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 3.1.
    """
    found = []
    image = 100 / report["images"]  # one image, in percent
    for target in TARGETS:
        rows = [row for row in report["rows"] if row["target"] == target]
        name = target.replace("_", " ")
        first, more_steps, _, far, larger, largest = rows
        zeros = max(row["zero_gradient"] for row in rows)
        if zeros > MANY_ZEROS:
            found.append(f"{name}: {100 * zeros:.0f}% of the gradients' entries are exactly 0: the attack stood still")
        # Rounding may turn a few images that lie on the border, which is no sign of anything.
        if abs(first["top1"] - far["top1"]) > max(0.5, 2 * image):
            found.append(
                f"{name}: 10 steps of 0.01 give {far['top1']:.2f}% with epsilon 10 and {first['top1']:.2f}% with 0.1, "
                "though they reach neither"
            )
        if target == "most_likely":  # turns against its own success: from a wrong class it may lead back
            continue
        for stronger, what in ((more_steps, "50 steps"), (larger, "epsilon 10"), (largest, "50 steps and epsilon 10")):
            if stronger["top1"] > first["top1"] + max(1.0, 2 * image):
                found.append(
                    f"{name}: {what} leave more right ({stronger['top1']:.2f}%) than the weaker attack "
                    f"({first['top1']:.2f}%)"
                )
    return found


# ---------------------------------------------------------------- what is shown

def beside(report: dict[str, Any]) -> bool:
    """Whether the write-up's figures are of the same task: SimpleNet, its 100 classes, its image size."""
    return (report["model"], report["classes"], report["image_size"]) == (
        "simplenet", writeup.CLASSES, writeup.IMAGE_SIZE,
    )


def print_sweep(console: Console, report: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="accuracy under attack: top-1 / top-5 (%)")
    table.add_column("steps", justify="right")
    table.add_column("step size", justify="right")
    table.add_column("epsilon", justify="right")
    compared, rows = beside(report), dict(zip(CELLS, report["rows"], strict=True))
    for target in TARGETS:
        table.add_column(target.replace("_", " "), justify="right")
        if compared:
            table.add_column("write-up", justify="right", style="dim")
    for setting in WRITEUP:
        numbers = (setting.num_steps, setting.step_size, setting.epsilon)
        cells = []
        for target in TARGETS:
            row = rows[setting, target]
            cells.append(f"{row['top1']:.2f} / {row['top5']:.2f}")
            if compared:
                cells.append("{:.2f} / {:.2f}".format(*writeup.UNDER_ATTACK[numbers][target]))
        table.add_row(*(f"{value:g}" for value in numbers), *cells)
    console.print(table)
    clean = report["clean"]
    console.print(
        f"clean: {clean['top1']:.2f} / {clean['top5']:.2f}. {report['images']:,} images of {report['classes']} "
        f"classes, {report['image_size']} px, {report['data']}; {report['model']}, {report['checkpoint']}, epoch "
        f"{report['epoch']}; {describe_backend(report['backend'], report['device'])}. {report['attack']}."
    )
    if report["doubts"]:
        console.print("What speaks against believing these figures:", style="bold red")
        for doubt in report["doubts"]:
            console.print(f"  {doubt}", style="red")


def bar_chart(report: dict[str, Any]) -> Figure:
    """Top-1 by setting, a bar for each target, the clean accuracy as a line."""
    figure = Figure(figsize=(9, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    width = 0.38
    for i, (target, colour) in enumerate(zip(TARGETS, ("tab:blue", "tab:orange"), strict=True)):
        values = [row["top1"] for row in report["rows"] if row["target"] == target]
        places = [n + (i - 0.5) * width for n in range(len(values))]
        bars = axes.bar(places, values, width, color=colour, label=target.replace("_", " "))
        axes.bar_label(bars, fmt="%.1f", fontsize="small")
    clean = report["clean"]["top1"]
    axes.axhline(clean, color="black", linestyle="--", linewidth=1, label=f"clean, {clean:.1f}%")
    axes.set_xticks(
        range(len(WRITEUP)),
        [f"{s.num_steps} × {s.step_size:g}\nepsilon {s.epsilon:g}" for s in WRITEUP],
    )
    axes.set(ylabel="top-1 (%)", ylim=(0, 1.15 * max(clean, *(row["top1"] for row in report["rows"]), 1)))
    axes.legend()
    name = Path(report["data"]).name
    figure.suptitle(f"{report['model']} under attack: {report['images']:,} images, {name}, {report['image_size']} px")
    return figure


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), TextColumn("left"),
        console=console, transient=True, expand=True, disable=console.quiet or not console.is_terminal,
    )


if __name__ == "__main__":
    main()
