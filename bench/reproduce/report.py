"""Puts the sections together, and writes REPORT.md and REPORT.html."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.reproduce.accuracy import architectures, better, convolution, looks, training
from bench.reproduce.cost import memory
from bench.reproduce.page import table, to_html
from bench.reproduce.plan import QUICK_EPOCHS, QUICK_PIXELS, QUICK_TRAIN, Stage
from bench.reproduce.results import Results
from bench.reproduce.robustness import attack, hardening
from train.files import atomic_write

TITLE = "The course write-up, reproduced by the conv lab"
SECTIONS = (
    ("The convolution", convolution),
    ("Models", architectures),
    ("Training", training),
    ("Memory", memory),
    ("Saliency", looks),
    ("Projected gradients", attack),
    ("Adversarial training", hardening),
    ("Better results on the same images", better),
)


def write_report(results: Results, stages: Sequence[Stage], about: dict[str, Any]) -> list[Path]:
    """The files written into `results.out`; `about` is when and where this was."""
    markdown = make_markdown(results, stages, about)
    page = to_html(markdown, TITLE, results.out)
    files = []
    for name, text in (("REPORT.md", markdown), ("REPORT.html", page)):
        files.append(results.out / name)
        with atomic_write(files[-1]) as file:
            file.write(text.encode())
    return files


def make_markdown(results: Results, stages: Sequence[Stage], about: dict[str, Any]) -> str:
    blocks = [f"# {TITLE}", *opening(results, about)]
    for number, (title, section) in enumerate(SECTIONS, start=1):
        blocks += [f"## {number}. {title}", *contents(section, results)]
    return "\n\n".join([*blocks, f"## {len(SECTIONS) + 1}. How it was made", *making(results, stages)]) + "\n"


def contents(section: Callable[[Results], list[str]], results: Results) -> list[str]:
    """The section's blocks, or that a file it is made of is damaged."""
    try:
        return section(results)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return [f"not available: a file that it is made of is damaged ({type(error).__name__}: {error})"]


def opening(results: Results, about: dict[str, Any]) -> list[str]:
    """What this is, and under which conditions."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    outcomes = results.outcomes.values()
    devices = " and ".join(dict.fromkeys(outcome.device for outcome in outcomes)) or "nothing yet"
    commits = " and ".join(dict.fromkeys(outcome.commit or "unknown" for outcome in outcomes)) or "unknown"
    blocks = [
        f"Made by `{about['command']}`, {about['ended']}, on {devices}; {versions}; commit {commits}. The last section "
        "says which step ran when.",
        "Every figure of ours stands beside the write-up's, which are its own: 100-class MiniPlaces, 128 px, one Tesla "
        "T4. *Measured*: it ran here and was timed, counted or read. *Interpreted*: a Triton kernel ran on a CPU; its "
        "results count, its time says nothing about a GPU. *Predicted*: computed without running. One run each, one "
        "seed: differences of a point or two between rows are noise.",
    ]
    if results.scope.quick:
        blocks.append(
            f"**This is --quick**: {QUICK_EPOCHS} epochs on at most {QUICK_TRAIN} images at {QUICK_PIXELS} px (what is "
            "trained adversarially: on all embedded ones), to show that every part works. Its accuracies do not "
            "reproduce the write-up's and do not compare with them."
        )
    if any(outcome.reason is not None for outcome in outcomes):
        blocks.append("**Steps failed**; the last section says which and why.")
    return blocks


def making(results: Results, stages: Sequence[Stage]) -> list[str]:
    """The commands, so that each can be run again by itself."""
    rows = []
    for stage in stages:
        outcome = results.outcomes.get(stage.name)
        how = (outcome.reason or "done", outcome.ended) if outcome else ("not run yet", "-")
        rows.append([stage.title, f"`{stage.typed}`", *how, f"{outcome.seconds:,.0f}" if outcome else "-"])
    return [
        "Each step is a command of the lab, run in this order; DIR is the folder of this report. Seconds are of its "
        "whole process, where it was gone on with of the last.",
        table(("step", "command", "outcome", "ended", "seconds"), rows, words=4),
    ]
