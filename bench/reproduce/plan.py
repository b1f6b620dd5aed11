"""The commands that make the report, in the order they run."""

from dataclasses import dataclass
from pathlib import Path

import models
from train.data import default_image_size

# What --quick cuts: enough that all stages end within 15 minutes on two cores, most of them Triton's interpreter.
QUICK_EPOCHS, QUICK_TRAIN, QUICK_VAL, QUICK_PIXELS = 3, 640, 300, 32
QUICK_ATTACKED, QUICK_CHECKED = 200, 64
PRETRAIN_EPOCHS, FURTHER_EPOCHS, QUICK_FURTHER_EPOCHS = 30, 10, 1

WRITEUP_GPU = "t4"
CHECK, COMPARE, DIAGRAM, MEMORY, TIMELINE, MEASURED = "check", "compare", "diagram", "memory", "timeline", "memory-gpu"
SALIENCY, SWEEP, PRETRAIN, ROBUST, MODERN = "saliency", "sweep", "pretrain", "robust", "simplenet-modern"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command."""

    name: str
    title: str
    module: str
    """As behind `python -m`."""
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Stages without which it cannot run."""
    run_folder: Path | None = None
    """Of a training: an interrupted one is gone on with there."""

    @property
    def has_begun(self) -> bool:
        """Whether there is something to go on with."""
        return self.run_folder is not None and (self.run_folder / "config.json").exists()

    @property
    def command(self) -> list[str]:
        """What is typed after `python`."""
        if self.has_begun:
            return ["-m", self.module, "--resume", str(self.run_folder)]
        return ["-m", self.module, *self.arguments]

    def typed(self, out: Path) -> str:
        """The command of a first run, as a person types it, with DIR for `out`: the same wherever that lies."""
        return " ".join(["python -m", self.module, *self.arguments]).replace(str(out), "DIR")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """What was asked for."""

    quick: bool
    data: str
    """As train.run's --data."""
    device: str
    """"cpu" or "cuda"."""
    weights: str
    """As train.run's --weights, of ResNet18."""

    @property
    def image_size(self) -> int:
        return QUICK_PIXELS if self.quick else default_image_size(self.data)


def run_name(model: str, conv: str) -> str:
    return f"{model}-{conv}"


def make_plan(scope: Scope, out: Path) -> list[Stage]:
    """All stages; their files go into `out`."""
    runs = {(model, conv): out / "runs" / run_name(model, conv) for model in models.MODELS for conv in CONVOLUTIONS}
    stages = [
        Stage(
            name=CHECK, title="convolutions against nn.Conv2d", module="bench.reproduce.check",
            arguments=("--device", scope.device, "--json", str(out / "check.json")),
        )
    ]  # fmt: skip
    for (model, conv), folder in runs.items():
        weights = ("--weights", scope.weights) if model == "resnet18" else ()
        stages.append(training(scope, run_name(model, conv), folder, model, conv, *weights))
    stages += [
        training(scope, MODERN, out / "runs" / MODERN, "simplenet", ours(scope), recipe="modern"),
        Stage(
            name=COMPARE, title="all models compared", module="train.compare",
            arguments=(*map(str, runs.values()), "--out", str(out / "compare")),
            needs=tuple(run_name(*key) for key in runs),
        ),
        Stage(
            name=DIAGRAM, title="CustomNet's diagram", module="train.diagram",
            arguments=("customnet", "--out", str(out / "customnet.png")),
        ),
        *memory(scope, out),
        Stage(
            name=SALIENCY, title="where the models look", module="attacks.run",
            arguments=("saliency", *(str(runs[model, "torch"]) for model in models.MODELS), "--device", scope.device,
                       "--out", str(out / "saliency")),
            needs=tuple(run_name(model, "torch") for model in models.MODELS),
        ),
        Stage(
            name=SWEEP, title="SimpleNet under attack", module="attacks.run",
            arguments=("sweep", str(runs["simplenet", "triton"]), *attacked(scope), "--out", str(out / "sweep")),
            needs=(run_name("simplenet", "triton"),),
        ),
        training(scope, PRETRAIN, out / "runs" / PRETRAIN, "simplenet", ours(scope), whole=True,
                 epochs=PRETRAIN_EPOCHS),
        Stage(
            name=ROBUST, title="adversarial training", module="attacks.run",
            arguments=("robust", str(out / "runs" / PRETRAIN / "last.pt"), *attacked(scope), "--epochs",
                       str(QUICK_FURTHER_EPOCHS if scope.quick else FURTHER_EPOCHS), "--out", str(out / "robust")),
            needs=(PRETRAIN,),
        ),
    ]  # fmt: skip
    return stages


CONVOLUTIONS = ("torch", "unfold", "triton")


def ours(scope: Scope) -> str:
    """What computes attacks and long trainings: our kernels where they are compiled. Interpreted, the write-up's 50
    steps would take hours; there PyTorch computes them, and the attack's own report holds ours against it."""
    return "triton" if scope.device == "cuda" else "torch"


def training(
    scope: Scope, name: str, folder: Path, model: str, conv: str, *more: str, recipe: str | None = None,
    whole: bool = False, epochs: int | None = None,
) -> Stage:
    """A training with the write-up's recipe, or cut down to --quick's, there with all images where `whole`."""
    arguments = [model, "--conv", conv, "--data", scope.data, "--image-size", str(scope.image_size)]
    arguments += ["--recipe", recipe or ("quick" if scope.quick else "writeup"), "--device", scope.device, *more]
    if scope.quick:
        arguments += ["--epochs", str(QUICK_EPOCHS), "--limit-val", str(QUICK_VAL)]
        arguments += [] if whole and scope.data == "fashion-mini" else ["--limit-train", str(QUICK_TRAIN)]
    elif epochs:
        arguments += ["--epochs", str(epochs)]
    return Stage(
        name=name, title=f"train {name.replace('-', ', ', 1)}", module="train.run",
        arguments=(*arguments, "--out", str(folder)), run_folder=folder,
    )  # fmt: skip


def attacked(scope: Scope) -> tuple[str, ...]:
    """Options of the attacks."""
    options = ("--device", scope.device, "--conv", ours(scope))
    if scope.quick:
        options += ("--limit", str(QUICK_ATTACKED), "--check-images", str(QUICK_CHECKED))
    return options


def memory(scope: Scope, out: Path) -> list[Stage]:
    """Predicted for the write-up's GPU and its step, whatever is trained here; on a GPU also measured there."""
    predict = ("--conv", *CONVOLUTIONS, "--predict", "--gpu", WRITEUP_GPU)
    stages = [
        Stage(
            name=MEMORY, title="memory, predicted", module="bench.memory",
            arguments=("all", *predict, "--json", str(out / "memory.json")),
        ),
        Stage(
            name=TIMELINE, title="memory over a step, predicted", module="bench.memory",
            arguments=("simplenet", *predict, "--timeline", str(out / "memory.png")),
        ),
    ]  # fmt: skip
    if scope.device == "cuda":
        stages.append(Stage(
            name=MEASURED, title="memory, measured", module="bench.memory",
            arguments=("all", "--conv", *CONVOLUTIONS, "--json", str(out / "memory-gpu.json")),
        ))  # fmt: skip
    return stages
