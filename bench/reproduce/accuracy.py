"""The report's sections on the convolution, the models, their training and what they look at."""

from collections.abc import Callable

import torch

import models
from bench.reproduce.check import CASES, TENSORS, wrongs
from bench.reproduce.page import table
from bench.reproduce.plan import CHECK, COMPARE, CONVOLUTIONS, DIAGRAM, MODERN, WRITTEN, run_name, saliency_name
from bench.reproduce.results import Missing, Results, cell
from train import writeup
from train.runs import Run

NAMES = {"simplenet": "SimpleNet", "customnet": "CustomNet", "simplevit": "SimpleViT", "resnet18": "ResNet18"}
NO_SUCH_RUN = "no such run"


def convolution(results: Results) -> list[str]:
    """Section 1."""
    blocks = [
        "The write-up checked its unfolding convolution against nn.Conv2d for three pairs of padding and stride, and "
        "by gradcheck; it gives no errors. Here both written convolutions are held to it in float64: "
        "‖ours − nn.Conv2d's‖ / ‖nn.Conv2d's‖, measured."
    ]
    try:
        report = results.json(CHECK, "check.json", even_failed=True)
    except Missing as reason:
        rows = [[conv, f"{p}, {s}", *[f"not available: {reason}"] * len(TENSORS)] for conv in WRITTEN for p, s in CASES]
        return [*blocks, table(("convolution", "padding, stride", *TENSORS), rows)]
    rows = [
        [f"{row['conv']} ({report['backends'][row['conv']]})", f"{row['padding']}, {row['stride']}",
         *(f"{row['errors'][name]:.1e}" for name in TENSORS)]
        for row in report["rows"]
    ]  # fmt: skip
    blocks.append(table(("convolution", "padding, stride", *TENSORS), rows))
    shape = "×".join(map(str, report["x_shape"]))
    blocks.append(
        f"x {shape}, {report['channels']} channels out, filter {report['filter']}×{report['filter']}. Any error above "
        f"{report['tolerance']:g} would be told: " + ("; ".join(wrongs(report)) or "there is none") + "."
    )
    rows = []
    for conv, found in report["gradcheck"].items():
        how = "along random directions (fast mode)" if found["fast"] else "each by itself"
        written = f"{conv} ({report['backends'][conv]})"
        rows.append([written, f"{found['derivatives']:,}", how, found["failed"] or "passed"])
    (one, *_) = report["gradcheck"].values()
    blocks.append(
        f"gradcheck, padding {one['padding']}, stride {one['stride']}, eps {one['eps']:g}, atol {one['atol']:g} (the "
        "write-up's own: passed):\n\n"
        + table(("convolution", "derivatives", "how", "outcome"), rows, words=4)
    )
    return blocks


def architectures(results: Results) -> list[str]:
    """Section 2."""
    rows = []
    for name, shown in NAMES.items():
        with torch.device("meta"):
            model = models.build(name, "torch", writeup.CLASSES, writeup.IMAGE_SIZE)
        count = sum(parameter.numel() for parameter in model.parameters())
        theirs = writeup.PARAMETERS.get(name)
        rows.append([shown, f"{count:,}", f"{theirs:,}" if theirs else "not given"])
    return [
        f"Trainable parameters for {writeup.CLASSES} classes at {writeup.IMAGE_SIZE} px. The write-up leaves widths of "
        "CustomNet open; `models/customnet.py` says what was chosen.",
        table(("model", "ours", "write-up"), rows),
        results.figure(DIAGRAM, "customnet.png", "CustomNet, as built"),
    ]


def training(results: Results) -> list[str]:
    """Section 3: accuracies and curves."""
    rows, crossings = [], []
    for name, shown in NAMES.items():
        for conv in CONVOLUTIONS:
            stage = run_name(name, conv)

            def of(figure: Callable[[Run], str], stage: str = stage) -> str:
                return cell(lambda: figure(results.run(stage)))

            theirs = writeups(name, conv)
            rows.append([
                shown, of(lambda run, conv=conv: f"{conv}, {run.summary['backend']}"),
                of(lambda run: accuracies(run.summary)), of(lambda run: str(run.config["epochs"])),
                f"{theirs.top1:.2f} / {theirs.top5:.2f}" if theirs else NO_SUCH_RUN,
                str(theirs.epochs) if theirs else NO_SUCH_RUN,
                of(lambda run: f"{run.summary['images_per_s']:,.0f}"),
            ])  # fmt: skip
            crossings.append([
                shown, conv, of(lambda run: str(run.crossing or "never")), of(lambda run: f"{gap(run):+.1f}"),
                of(lambda run: str(reached(run, 0.9 * max(run.column("val_top1"))))),
            ])  # fmt: skip
    return [
        conditions_of(results),
        "Validation top-1 / top-5 in percent after the last epoch, measured. images/s are of the training steps, "
        "measured where the run says; interpreted ones say nothing about a GPU.",
        table(("model", "convolution", "top-1 / top-5", "epochs", "write-up", "its epochs", "images/s"), rows, words=2),
        "When train top-1 first passes validation top-1, the gap between them at the end (train less validation, "
        "points; train accuracy is counted during the epoch, on augmented images), and the first epoch with 90% of the "
        "run's best validation top-1. The write-up gives these as a figure.",
        table(("model", "convolution", "train passes", "final gap", "90% of best"), crossings, words=2),
        findings(results),
        results.figure(COMPARE, "compare/compare.png", "All models and convolutions by epoch"),
        *(
            results.figure(
                run_name(name, conv), f"runs/{run_name(name, conv)}/curves.png",
                f"{shown}, {conv}: top-1, top-5, learning rate, loss",
            )
            for name, shown in NAMES.items() for conv in CONVOLUTIONS
        ),
    ]  # fmt: skip


def writeups(model: str, conv: str) -> writeup.Figures | None:
    """Its row for just this model and convolution; its ResNet18 is fine-tuned."""
    theirs = writeup.figures_for(model, conv, fine_tuned=True)
    return theirs if theirs and theirs.conv == conv else None


def accuracies(summary: dict) -> str:
    return f"{summary['val_top1']:.2f} / {summary['val_top5']:.2f}"


def gap(run: Run) -> float:
    return run.column("train_top1")[-1] - run.column("val_top1")[-1]


def reached(run: Run, top1: float) -> int | None:
    """The first epoch with so much validation top-1."""
    return next((i for i, value in enumerate(run.column("val_top1"), start=1) if value >= top1), None)


def findings(results: Results) -> str:
    """What the write-up reads from its curves, beside what these show."""
    try:
        runs = {name: results.run(run_name(name, "torch")) for name in NAMES}
    except Missing as reason:
        return f"The write-up's two findings, ResNet18 overfits and CustomNet converges faster: not available: {reason}"
    widest = max(runs, key=lambda name: gap(runs[name]))
    best = max(runs["simplenet"].column("val_top1"))
    passed = reached(runs["customnet"], best)
    when = f"reaches it in epoch {passed}" if passed else "never reaches it"
    return (
        f"The write-up finds ResNet18 overfitted; here the widest gap is {NAMES[widest]}'s ({gap(runs[widest]):+.1f} "
        f"points, ResNet18's {gap(runs['resnet18']):+.1f}). It finds that CustomNet converges faster than SimpleNet; "
        f"SimpleNet's best here is {best:.2f}%, in epoch {reached(runs['simplenet'], best)}, and CustomNet {when} "
        "(both by nn.Conv2d)."
    )


def conditions_of(results: Results) -> str:
    """What was trained on, by the first run there is."""
    for name in NAMES:
        for conv in CONVOLUTIONS:
            try:
                run = results.run(run_name(name, conv))
            except Missing:
                continue
            summary, config = run.summary, run.config
            few = " Of so few classes the right one is always among five." if summary["classes"] <= 5 else ""
            return (
                f"Here: {summary['train_images']:,} training and {summary['val_images']:,} validation images of "
                f"{summary['classes']} classes, {summary['image_size']} px, recipe {config['recipe']}, seed "
                f"{config['seed']}, {summary['device']}; ResNet18 from "
                f"{'scratch' if results.scope.weights == 'none' else 'pretrained weights'}. The write-up: MiniPlaces, "
                f"100,000 and 10,000 images of {writeup.CLASSES} classes, {writeup.IMAGE_SIZE} px, one Tesla T4; its "
                f"ResNet18 is fine-tuned from ImageNet's weights.{few}"
            )
    return "Here: not available: no training ended well."


def looks(results: Results) -> list[str]:
    """Section 5."""
    blocks = ["Where each model looks, as red patches: the absolute gradient of the predicted class's cross-entropy, "
              "largest of three channels, beside two methods the write-up does not have. Measured."]  # fmt: skip
    for name, shown in NAMES.items():
        stage, folder = saliency_name(name), f"saliency/{name}"
        blocks.append(results.figure(stage, f"{folder}/saliency.png", f"{shown}: true and predicted classes"))
        try:
            doubts = results.json(stage, f"{folder}/saliency.json")["doubts"]
        except Missing as reason:
            doubts = [f"not available: {reason}"]
        blocks += [f"{shown}: {doubt}" for doubt in doubts]
    return blocks


def better(results: Results) -> list[str]:
    """Section 8."""
    rows = [
        [what, f"{top1:.2f} / {top5:.2f}", "not available: not one of the lab's models"]
        for what, (top1, top5) in writeup.BETTER.items()
    ]
    ours = cell(lambda: accuracies(results.run(MODERN).summary))
    rows.append(["SimpleNet, the lab's recipe \"modern\"", NO_SUCH_RUN, ours])
    return [
        "Results of others on MiniPlaces, and what this lab's own recipe gives its smallest model here.",
        table(("model", "published", "here: top-1 / top-5"), rows),
    ]
