"""Every command of the lab with its own parser, and all of them cut short where their work would begin."""

import argparse
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import attacks.run.command
import bench.gpu_check.command
import bench.memory.command
import bench.report_card.command
import bench.reproduce.check
import bench.reproduce.command
import models
import models.resnet18
import train.compare
import train.diagram
import train.evaluate
import train.run
from attacks.run import explain, harden, perturb, sweep
from bench.reproduce.stages import Outcome
from train import data, fashion_mini, session


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (90, 60, 30)).save(file, "png")
    return file.getvalue()


PICTURE = _picture()


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One of the lab's commands, or one subcommand of one."""

    name: str
    """As errors begin: "train.run", "attacks.run pgd"."""
    main: Callable[[list[str]], None]
    parser: argparse.ArgumentParser
    first: tuple[str, ...] = ()
    """What is typed before its own arguments."""


def _commands() -> Iterator[Command]:
    for module in (
        train.run, train.evaluate, train.compare, train.diagram, bench.memory.command, bench.report_card.command,
        bench.gpu_check.command, bench.reproduce.command, bench.reproduce.check, attacks.run.command,
    ):  # fmt: skip
        parser = module.make_parser()
        yield Command(name=name_of(parser), main=module.main, parser=parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, own in action.choices.items():
                    yield Command(name=name_of(own), main=module.main, parser=own, first=(name,))


def name_of(parser: argparse.ArgumentParser) -> str:
    return parser.prog.removeprefix("python -m ")


COMMANDS = tuple(_commands())


def cut_short(patch: pytest.MonkeyPatch) -> None:
    """All that is checked before the work is checked; the work itself is left out, and images are few and small.

    train.run           until the first step: data is read, the model built, last.pt written
    attacks.run         until the first batch of a checkpoint that has been loaded with its images
    train.evaluate      until the first batch
    train.compare       all but the figure's drawing; train.diagram likewise
    bench.memory        until a step is accounted for; --json is written
    bench.report_card   until a kernel is compiled; --json is written
    bench.gpu_check     as if there were a GPU, until the first part
    bench.reproduce     until the first stage; its check until the first convolution
    """
    arrays = fashion_mini.load_arrays()
    few = {name: array[: 40 if "train" in name else 20] for name, array in arrays.items()}
    patch.setattr(fashion_mini, "load_arrays", lambda: few)
    patch.setattr(data.fashion_mnist, "locate", lambda *_: Path("nowhere"))  # nothing is downloaded
    patch.setattr(models.resnet18, "_download", lambda: models.resnet18.ResNet18(num_classes=1000).state_dict())
    patch.setattr(data, "stored_size", lambda image_size: min(image_size, 40))
    patch.setattr(session, "train", lambda *_: None)
    for attack in (explain, harden, perturb, sweep):
        patch.setattr(attack, "run_one", lambda *_, **__: {})
        each = attack.each_subject
        patch.setattr(attack, "each_subject", lambda *a, _each=each, **k: _each(*a, **k)[:1])
    result = train.evaluate.Result(loss=1.0, top1=1.0, top5=5.0, confusion=torch.eye(10, dtype=torch.int64))
    patch.setattr(train.evaluate, "evaluate", lambda *_, **__: result)
    picture = SimpleNamespace(savefig=lambda file, **_: file.write(PICTURE))
    for module in (train.compare, train.diagram):
        patch.setattr(module, "draw", lambda *_: picture)

    memory, card = bench.memory.command, bench.report_card.command
    for name in ("live", "report", "traffic"):
        patch.setattr(memory, name, lambda _, arguments, __: memory.write_reports(arguments, [{}]))
    patch.setattr(card, "row", lambda *_: None)
    for name in ("make_report", "draw", "show", "compare"):
        patch.setattr(card, name, lambda *_: {})
    patch.setattr(card.shown, "print_comparison", lambda *_: None)

    check, reproduce, gpu = bench.reproduce.check, bench.reproduce.command, bench.gpu_check.command
    patch.setattr(check, "check", lambda _: {"rows": [], "gradcheck": {}, "tolerance": 0})
    patch.setattr(check, "show", lambda *_: None)
    done = Outcome(command="", seconds=0.0, reason=None, ended="", device="", commit=None)
    patch.setattr(reproduce, "run_all", lambda stages, *_: {stage.name: done for stage in stages})
    patch.setattr(reproduce, "write_report", lambda *_: [])
    for module in (reproduce, gpu):
        patch.setattr(module, "conditions", lambda _: {"device": "", "commit": None})
    patch.setattr(gpu, "why_no_gpu", lambda: None)
    patch.setattr(gpu, "arch_of", lambda _: "sm_90")
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("run_parts", "print_summary"):
        patch.setattr(gpu, name, lambda *_: None)
