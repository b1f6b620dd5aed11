"""ResNet18 (He et al. 2016): torchvision's, with convolutions of the class asked for, and its pretrained weights."""

from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet, ResNet18_Weights

from models.files import is_plain, load_tensors

# What DistributedDataParallel and torch.compile put before the names of the model that they wrap.
WRAPPERS = ("module.", "_orig_mod.")


class ResNet18(ResNet):
    """x (N, 3, S, S) float -> logits (N, num_classes), for S >= 32; names of parameters are torchvision's.

    Freshly initialised as torchvision does it; `load_pretrained` puts in ImageNet weights.
    """

    def __init__(self, num_classes: int = 100, conv: type[nn.Conv2d] = nn.Conv2d):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Conv2d):
                    setattr(parent, name, _as_class(child, conv))


def _as_class(module: nn.Conv2d, conv: type[nn.Conv2d]) -> nn.Conv2d:
    """A convolution of class `conv` with the geometry and the parameters of `module`."""
    replacement = conv(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        bias=False,
        device="meta",  # draws no random numbers for a weight that is replaced at once
    )
    replacement.weight = module.weight
    return replacement


def load_pretrained(model: ResNet18, weights: str | Path) -> None:
    """Puts pretrained weights into `model`; the head stays as it is where theirs is for another number of classes.

    weights   "imagenet", which downloads torchvision's (once: torch.hub caches them), or the path of a file that
              holds a state_dict of torchvision's resnet18, alone or under the key "state_dict" or "model"

    Raises ValueError, in one line, where the weights cannot be had or do not fit.
    """
    if weights == "imagenet":
        source = ResNet18_Weights.IMAGENET1K_V1.url
        state = _download()
    else:
        source = str(weights)
        state = _read(Path(weights))
    wanted = model.state_dict()
    head = [name for name in wanted if name.startswith("fc.")]
    if any(name not in state or state[name].shape != wanted[name].shape for name in head):
        state = {name: value for name, value in state.items() if name not in head} | {n: wanted[n] for n in head}
    _check(state, wanted, source)
    model.load_state_dict(state)


def _download() -> dict[str, Tensor]:
    weights = ResNet18_Weights.IMAGENET1K_V1
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the file is not what its hash says
        raise ValueError(
            f"cannot download {weights.url} ({' '.join(str(error).split())}); fetch it elsewhere and pass "
            f"--weights FILE"
        ) from error
    except Exception as error:
        raise ValueError(
            f"what was downloaded from {weights.url} is damaged ({type(error).__name__}); delete it from "
            f"{Path(torch.hub.get_dir(), 'checkpoints')}"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file, without the prefixes of WRAPPERS."""
    if not path.is_file():
        raise ValueError(f"no file of weights {path}")
    try:
        state = load_tensors(path)
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds no weights ({type(error).__name__})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(map(is_plain, state.values())):
        raise ValueError(f"{path} holds no state_dict: a dictionary of tensors is expected")
    return {_unwrapped(str(name)): value for name, value in state.items()}


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _check(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    """Raises ValueError where names or shapes are not ResNet18's, or values are no numbers."""
    # Files from before PyTorch 0.4.1 do not count batches, and load_state_dict makes up for it.
    missing = [name for name in wanted.keys() - state.keys() if not name.endswith("num_batches_tracked")]
    for fault, names in (("lacks", missing), ("has, beyond it,", state.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{source} is no ResNet18: it {fault} {min(names)}{more}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{source} is no ResNet18: {name} is {tuple(value.shape)} and should be {tuple(wanted[name].shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{source} is damaged: not every value of {name} is a finite number")
