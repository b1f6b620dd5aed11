"""Mean loss, top-1 and top-5 over the images of an epoch, judged by torchmetrics."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores


class Meter:
    """Sums that stay on the device until they are asked for, and that a checkpoint can hold."""

    def __init__(self, num_classes: int, device: torch.device):
        self.num_classes = num_classes
        self.k = min(5, num_classes)  # of fewer than six classes the true one is always among the first five
        # [loss, right at the first guess, right within k guesses, images]
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """logits (B, classes), labels (B,), loss the batch's mean."""
        self.sums += self.sums_of(logits, labels, loss)

    def sums_of(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """What one batch adds to `sums`: (4,) float64."""
        logits, count = logits.detach(), len(labels)
        return torch.stack([
            loss.detach().double() * count,
            self._right(logits, labels, 1).double(),
            self._right(logits, labels, self.k).double(),
            torch.tensor(float(count), dtype=torch.float64, device=logits.device),
        ])

    def _right(self, logits: Tensor, labels: Tensor, k: int) -> Tensor:
        scores = multiclass_stat_scores(
            logits, labels, self.num_classes, average="micro", top_k=k, validate_args=False
        )
        return scores[0]  # true positives

    def compute(self) -> tuple[float, float, float]:
        """(mean loss, top-1 in percent, top-5 in percent)."""
        loss, top1, top5, images = self.sums.tolist()
        return loss / images, 100 * top1 / images, 100 * top5 / images
