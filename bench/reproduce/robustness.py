"""The report's sections on attacks and adversarial training."""

from pathlib import Path
from typing import Any

from attacks.sweep import WRITEUP
from bench.reproduce.page import table
from bench.reproduce.plan import PRETRAIN, ROBUST, SWEEP
from bench.reproduce.results import Missing, Results, cell
from train import writeup

TARGETS = tuple(writeup.UNDER_ATTACK[10, 0.01, 0.1])
FIRST, FAR = WRITEUP[0], WRITEUP[3]
"""10 steps of 0.01 never leave a ball of 0.1, so that a larger one changes nothing."""


def attack(results: Results) -> list[str]:
    """Section 6."""
    try:
        report = results.json(SWEEP, "sweep/sweep.json")
        names = ("num_steps", "step_size", "epsilon", "target")
        found = {tuple(row[name] for name in names): pair(row) for row in report["rows"]}
        clean, about, doubts = pair(report["clean"]), subject(report), report["doubts"]
        missing, checks = "not available: sweep.json lacks it", checked(report["checks"])
    except Missing as reason:
        found, missing = {}, f"not available: {reason}"
        clean, about, doubts, checks = missing, missing, [], [missing]
    rows = []
    for setting in WRITEUP:
        numbers = (setting.num_steps, setting.step_size, setting.epsilon)
        row = ["{:g} / {:g} / {:g}".format(*numbers)]
        for target in TARGETS:
            row += [found.get((*numbers, target), missing), both(writeup.UNDER_ATTACK[numbers][target])]
        rows.append(row)
    headers = ["steps / step size / epsilon"]
    for target in TARGETS:
        headers += [target.replace("_", " "), "write-up"]
    return [
        "SimpleNet's top-1 / top-5 in percent under projected gradients in an L-infinity ball: sizes in normalised "
        "space, no random start, pixels not clamped, as in the write-up. Measured.",
        table(headers, rows),
        f"Clean: {clean}. {about}",
        same_ball(found),
        *(f"Doubt: {doubt}." for doubt in doubts),
        "Whether it can be believed, by the attacks' own checks:",
        *checks,
        results.figure(SWEEP, "sweep/sweep.png", "Least and most likely over the settings"),
        results.figure(
            SWEEP, "sweep/sweep-samples.png", "Clean and perturbed: the default, more steps, and all three raised"
        ),
    ]


def same_ball(found: dict[tuple, str]) -> str:
    """The check that costs nothing: 10 steps of 0.01 with epsilon 10 are those with 0.1."""
    said = []
    for target in TARGETS:
        one, other = (found.get((s.num_steps, s.step_size, s.epsilon, target)) for s in (FIRST, FAR))
        if one is None:
            return "Whether 10 steps of 0.01 give the same with epsilon 0.1 and 10: not available, see above."
        said.append(f"{target.replace('_', ' ')} {one} and {other}")
    return f"10 steps of 0.01 reach neither epsilon 0.1 nor 10, so both must give the same: {'; '.join(said)}."


def hardening(results: Results) -> list[str]:
    """Section 7."""
    try:
        report: dict[str, Any] | None = results.json(ROBUST, "robust/robust.json")
        reason = ""
    except Missing as missing:
        report, reason = None, f"not available: {missing}"
    rows = []
    for name, shown in (("plain", "SimpleNet"), ("adversarial", "adversarially trained SimpleNet")):
        clean, attacked = writeup.HARDENED[name]
        copy = report["copies"][name] if report else None
        ours = [pair(copy[under]) if copy else reason for under in ("clean", *TARGETS)]
        rows.append([shown, ours[0], both(clean), *ours[1:], both(attacked)])
    blocks = [
        "Top-1 / top-5 in percent, clean and under attack, measured. The write-up does not say which attack it used at "
        "the end, nor the schedule of the further epochs.",
        table(
            ("model", "clean", "write-up", *(f"under {target.replace('_', ' ')}" for target in TARGETS),
             "write-up, attacked"), rows,
        ),
    ]  # fmt: skip
    if report:
        training, final = report["training"], report["attack"]
        epochs = cell(lambda: f"{results.run(PRETRAIN).config['epochs']} epochs")
        blocks.append(
            f"Pre-trained ({epochs}), then {training['epochs']} more each by the recipe's schedule from its start; "
            f"the adversarial copy's on images of {training['num_steps']} steps of {training['step_size']:g}, epsilon "
            f"{training['epsilon']:g}, {training['target'].replace('_', ' ')}. At the end {final['num_steps']} steps "
            f"of {final['step_size']:g}, epsilon {final['epsilon']:g}. {subject(report['pretrained'])}"
        )
        for name in ("plain", "adversarial"):
            blocks += [f"Checks of the {name} copy:", *checked(report["copies"][name]["checks"])]
    return [*blocks, results.figure(ROBUST, "robust/robust.png", "Both copies under attack, and over epsilon")]


def checked(examination: dict[str, Any]) -> list[str]:
    """The checks of an attack as a table: what was found, and what it means."""
    rows = [
        [check["name"], check["found"], ": ".join(filter(None, (check["verdict"], check["words"])))]
        for check in examination["checks"]
    ]
    return [table(("check", "found", "verdict"), rows, words=3)]


def pair(figures: dict[str, float]) -> str:
    return both((figures["top1"], figures["top5"]))


def both(figures: tuple[float, float]) -> str:
    return "{:.2f} / {:.2f}".format(*figures)


def subject(conditions: dict[str, Any]) -> str:
    """What was attacked, and by which convolution."""
    return (
        f"The weights after epoch {conditions['epoch']} ({Path(conditions['checkpoint']).name}) on "
        f"{conditions['images']:,} validation images, {conditions['image_size']} px, {conditions['classes']} "
        f"classes; {conditions['conv']} convolution ({conditions['backend']}), {conditions['device']}, "
        f"{conditions['precision']}."
    )
