"""SimpleNet: the write-up's plain convolutional network, without normalisation.

    block1   conv 7x7 s2 p3  3 ->  64, ReLU                                         S   -> S/2
    block2   maxpool 3/2/1; 1x1 64 -> 64, 3x3 p1 64 -> 64, 1x1 64 -> 256            S/2 -> S/4
    block3   maxpool 3/2/1; 1x1 256 -> 128, 3x3 p1 128 -> 128, 1x1 128 -> 512       S/4 -> S/8
    head     global average pool, linear 512 -> classes

Every convolution has a bias and is followed by ReLU. 365,028 parameters at 100 classes.
"""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d


class SimpleNet(nn.Module):
    """x (N, 3, S, S) float -> logits (N, num_classes), for any S >= 8."""

    def __init__(self, num_classes: int = 100, conv: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        self.block1 = nn.Sequential(conv(3, 64, 7, stride=2, padding=3), nn.ReLU(inplace=True))
        self.block2 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *bottleneck(conv, 64, 64, 256))
        self.block3 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *bottleneck(conv, 256, 128, 512))
        self.pool = GlobalAverage()
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(x)))  # (N, 512, S/8, S/8)
        return self.head(self.pool(x).flatten(1))


class GlobalAverage(nn.AdaptiveAvgPool2d):
    """x (N, C, H, W) -> (N, C, 1, 1), the average over all pixels.

    AdaptiveAvgPool2d(1)'s gradient is contiguous whatever the layout of x, and a channels-last network then copies it:
    SimpleNet's training step would hold its largest gradient twice. This one's has the layout of x.
    """

    def __init__(self):
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, x.shape[2:])


def bottleneck(conv: type[nn.Conv2d], in_channels: int, width: int, out_channels: int) -> list[nn.Module]:
    """1x1, 3x3 and 1x1 convolutions, each followed by ReLU."""
    return [
        conv(in_channels, width, 1), nn.ReLU(inplace=True),
        conv(width, width, 3, padding=1), nn.ReLU(inplace=True),
        conv(width, out_channels, 1), nn.ReLU(inplace=True),
    ]
