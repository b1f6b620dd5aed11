"""The commands that make the report, in the order they run."""

import shlex
from dataclasses import dataclass
from pathlib import Path, PurePath

import models
from train.data import FASHION_MINI, default_image_size

# What --quick cuts: enough that all stages end within 15 minutes on two cores, most of it in Triton's interpreter.
QUICK_EPOCHS, QUICK_TRAIN, QUICK_VAL, QUICK_PIXELS = 3, 640, 300, 32
QUICK_ATTACKED, QUICK_CHECKED = 200, 64
PRETRAIN_EPOCHS, FURTHER_EPOCHS, QUICK_FURTHER_EPOCHS = 30, 10, 1

WRITEUP_GPU = "t4"
CONVOLUTIONS = tuple(models.LABS)
WRITTEN = tuple(conv for conv in CONVOLUTIONS if conv != "torch")
"""Out by hand, and held to PyTorch's."""
CHECK, COMPARE, DIAGRAM, MEMORY, TIMELINE, MEASURED = "check", "compare", "diagram", "memory", "timeline", "memory-gpu"
SWEEP, PRETRAIN, ROBUST, MODERN = "sweep", "pretrain", "robust", "simplenet-modern"
RUNS, MORE = PurePath("runs"), PurePath("more")
"""Folders of the trainings that are compared, and of the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command. Paths among its arguments lie in the report's folder."""

    name: str
    title: str
    module: str
    """As behind `python -m`."""
    arguments: tuple[str | PurePath, ...]
    needs: tuple[str, ...] = ()
    """Stages without which it cannot run."""
    reads: tuple[str, ...] = ()
    """Others whose results it takes where there are any."""
    run_folder: PurePath | None = None
    """Of a training: an interrupted one is gone on with there."""

    def has_begun(self, out: Path) -> bool:
        """Whether there is something to go on with."""
        return self.run_folder is not None and (out / self.run_folder / "config.json").exists()

    def command(self, out: Path) -> list[str]:
        """What is typed after `python`."""
        if self.has_begun(out):
            return ["-m", self.module, "--resume", str(out / self.run_folder)]
        arguments = (str(out / one) if isinstance(one, PurePath) else one for one in self.arguments)
        return ["-m", self.module, *arguments]

    @property
    def typed(self) -> str:
        """The command of a first run, as a person types it, with DIR for the report's folder."""
        arguments = (f"DIR/{one}" if isinstance(one, PurePath) else one for one in self.arguments)
        return shlex.join(["python", "-m", self.module, *arguments])


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


def saliency_name(model: str) -> str:
    return f"saliency-{model}"


def make_plan(scope: Scope) -> list[Stage]:
    stages = [
        Stage(
            name=CHECK, title="convolutions against nn.Conv2d", module="bench.reproduce.check",
            arguments=("--device", scope.device, "--json", PurePath("check.json")),
        )
    ]  # fmt: skip
    for model in models.MODELS:
        for conv in CONVOLUTIONS:
            weights = ("--weights", scope.weights) if model == "resnet18" else ()
            stages.append(training(scope, run_name(model, conv), RUNS, model, conv, *weights))
    stages += [
        training(scope, MODERN, MORE, "simplenet", ours(scope), recipe="modern"),
        Stage(
            name=COMPARE, title="all models compared", module="train.compare",
            arguments=(RUNS, "--out", PurePath("compare")), reads=tuple(one.name for one in stages[1:]),
        ),
        Stage(
            name=DIAGRAM, title="CustomNet's diagram", module="train.diagram",
            arguments=("customnet", "--out", PurePath("customnet.png")),
        ),
        *memory(scope),
        *(saliency(scope, model) for model in models.MODELS),
        Stage(
            name=SWEEP, title="SimpleNet under attack", module="attacks.run",
            arguments=("sweep", RUNS / run_name("simplenet", "triton") / "last.pt", *attacked(scope), "--out",
                       PurePath("sweep")),
            needs=(run_name("simplenet", "triton"),),
        ),
        training(scope, PRETRAIN, MORE, "simplenet", ours(scope), whole=True, epochs=PRETRAIN_EPOCHS),
        Stage(
            name=ROBUST, title="adversarial training", module="attacks.run",
            arguments=("robust", MORE / PRETRAIN / "last.pt", *attacked(scope), "--epochs",
                       str(QUICK_FURTHER_EPOCHS if scope.quick else FURTHER_EPOCHS), "--out", PurePath("robust")),
            needs=(PRETRAIN,),
        ),
    ]  # fmt: skip
    return stages


def ours(scope: Scope) -> str:
    """What computes attacks and long trainings: our kernels where they are compiled. Interpreted, the write-up's 50
    steps would take hours; there PyTorch computes them, and the attack's own kernel check holds ours against it."""
    return "triton" if scope.device == "cuda" else "torch"


def training(
    scope: Scope, name: str, folder: PurePath, model: str, conv: str, *more: str, recipe: str | None = None,
    whole: bool = False, epochs: int | None = None,
) -> Stage:
    """A training with the write-up's recipe, or cut down to --quick's, there with all embedded images where `whole`."""
    arguments = [model, "--conv", conv, "--data", scope.data, "--image-size", str(scope.image_size)]
    arguments += ["--recipe", recipe or ("quick" if scope.quick else "writeup"), "--device", scope.device, *more]
    if scope.quick:
        arguments += ["--epochs", str(QUICK_EPOCHS), "--limit-val", str(QUICK_VAL)]
        arguments += [] if whole and scope.data == FASHION_MINI else ["--limit-train", str(QUICK_TRAIN)]
    elif epochs:
        arguments += ["--epochs", str(epochs)]
    return Stage(
        name=name, title=f"train {name.replace('-', ', ', 1)}", module="train.run",
        arguments=(*arguments, "--out", folder / name), run_folder=folder / name,
    )  # fmt: skip


def saliency(scope: Scope, model: str) -> Stage:
    """By PyTorch's convolution, whose maps are the same and take seconds without a GPU too."""
    run = run_name(model, "torch")
    return Stage(
        name=saliency_name(model), title=f"where {model} looks", module="attacks.run",
        arguments=("saliency", RUNS / run, "--device", scope.device, "--out", PurePath("saliency", model)),
        needs=(run,),
    )  # fmt: skip


def attacked(scope: Scope) -> tuple[str, ...]:
    """Options of the attacks."""
    options = ("--device", scope.device, "--conv", ours(scope))
    if scope.quick:
        options += ("--limit", str(QUICK_ATTACKED), "--check-images", str(QUICK_CHECKED))
    return options


def memory(scope: Scope) -> list[Stage]:
    """Predicted for the write-up's GPU and its step, whatever is trained here; on a GPU also measured there."""
    predict = ("--conv", *CONVOLUTIONS, "--predict", "--gpu", WRITEUP_GPU)
    stages = [
        Stage(
            name=MEMORY, title="memory, predicted", module="bench.memory",
            arguments=("all", *predict, "--json", PurePath("memory.json")),
        ),
        Stage(
            name=TIMELINE, title="memory over a step, predicted", module="bench.memory",
            arguments=("simplenet", *predict, "--timeline", PurePath("memory.png")),
        ),
    ]  # fmt: skip
    if scope.device == "cuda":
        stages.append(Stage(
            name=MEASURED, title="memory, measured", module="bench.memory",
            arguments=("all", "--conv", *CONVOLUTIONS, "--json", PurePath("memory-gpu.json")),
        ))  # fmt: skip
    return stages
