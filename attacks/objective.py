"""What an attack wants of the logits: whose cross-entropy it raises or lowers, and when it has succeeded."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

TARGETS = ("least_likely", "most_likely", "untargeted")


@dataclass(frozen=True, slots=True)
class Objective:
    """One of the targets of `pgd`, for a batch of N images."""

    target: str
    """A name in TARGETS, or "given"."""
    labels: Tensor | None
    """(N,) int64: for "given" the labels to reach, else the true ones where they are known."""
    judges: Tensor | None
    """(N,) int64: the labels that `margin` goes by: `labels`, or the clean predictions where those are unknown."""

    @property
    def sign(self) -> int:
        """1 where the loss of `aim` is to rise, -1 where it is to fall."""
        return 1 if self.target in ("most_likely", "untargeted") else -1

    def aim(self, logits: Tensor) -> Tensor:
        """(N, K) -> (N,): the labels whose loss the next step changes."""
        if self.target in ("untargeted", "given"):
            return self.labels.clone()  # autograd refuses labels that were made in inference mode
        if self.target == "most_likely":
            return logits.argmax(dim=1)
        if self.labels is not None:
            logits = logits.scatter(1, self.labels[:, None], math.inf)
        return logits.argmin(dim=1)

    def loss(self, logits: Tensor) -> Tensor:
        """(N, K) -> (N,), the cross-entropy of the labels aimed at."""
        return F.cross_entropy(logits, self.aim(logits.detach()), reduction="none")

    def judged_by(self, clean: Tensor) -> "Objective":
        """With the predictions of the clean logits (N, K) for judges where labels are unknown."""
        return self if self.judges is not None else replace(self, judges=clean.argmax(dim=1))

    def margin(self, logits: Tensor) -> Tensor:
        """(N, K) -> (N,), below 0 where the attack has succeeded: the image is no longer taken for what it is.

        For "given": below 0 where it is taken for the label that was asked for.
        """
        at_label = logits.gather(1, self.judges[:, None]).squeeze(1)
        others = logits.scatter(1, self.judges[:, None], -math.inf).amax(dim=1)
        return others - at_label if self.target == "given" else at_label - others

    def __getitem__(self, chosen: Tensor) -> "Objective":
        """For some of the images."""
        return replace(self, **{
            name: labels[chosen] for name in ("labels", "judges") if (labels := getattr(self, name)) is not None
        })


class DifferenceOfLogitsRatio(Objective):
    """Moves away from the true labels by Croce and Hein's DLR loss, which a network's scale does not change.

    -(z_y - max_{i != y} z_i) / (z_1st - z_3rd), of the logits z in falling order: where large logits make the
    cross-entropy's gradient vanish, this one's stays (Croce & Hein 2020, section 4.1). Three classes at least.
    """

    __slots__ = ()

    def loss(self, logits: Tensor) -> Tensor:
        if logits.shape[1] < 3:
            raise ValueError(f"the DLR loss needs 3 classes or more, the model has {logits.shape[1]}")
        ordered = logits.sort(dim=1, descending=True).values
        at_label = logits.gather(1, self.labels[:, None]).squeeze(1)
        others = torch.where(at_label == ordered[:, 0], ordered[:, 1], ordered[:, 0])
        return (others - at_label) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def make_objective(target: str | Tensor, y: Tensor | None, x: Tensor) -> Objective:
    """Raises ValueError for an unknown target, labels that do not fit x (N, ...), or "untargeted" without labels."""
    if isinstance(target, Tensor):
        labels = check_labels("target", target, x)
        return Objective("given", labels, labels)
    if target not in TARGETS:
        raise ValueError(f"target must be a label tensor or one of {', '.join(map(repr, TARGETS))}, got {target!r}")
    if target == "untargeted" and y is None:
        raise ValueError('target="untargeted" moves images away from their true labels: give them as y')
    labels = None if y is None else check_labels("y", y, x)
    return Objective(target, labels, labels)


def check_images(x: Tensor) -> Tensor:
    """x without its history; ValueError unless it is a batch of images in a precision to attack or explain in."""
    if x.dim() != 4 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be (N, C, H, W) of float32 or float64, got {tuple(x.shape)} of {x.dtype}")
    return x.detach()


def check_labels(name: str, labels: Tensor, x: Tensor) -> Tensor:
    if labels.shape != x.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{name} must be {len(x)} integer labels, one an image; got {tuple(labels.shape)} of {labels.dtype}"
        )
    if len(labels) and labels.min() < 0:  # of which cross-entropy ignores -100, without a word
        raise ValueError(f"{name} must be {len(x)} integer labels of at least 0, got {labels.min()}")
    return labels.to(x.device, torch.int64)
