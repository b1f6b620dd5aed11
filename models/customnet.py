"""CustomNet: SimpleNet with batch normalisation and four skip blocks.

    block1   conv 7x7 s2 p3  3 -> 64, ReLU, batch norm                              S   -> S/2
    block2   maxpool 3/2/1; 1x1 64 -> 64, 3x3 p1 64 -> 64, 1x1 64 -> 256, norm      S/2 -> S/4
    skips    4 times x + norm(1x1 256 -> 32, 3x3 p1 32 -> 32, 1x1 32 -> 256)        S/4
    block3   maxpool 3/2/1; 1x1 256 -> 128, 3x3 p1 128 -> 128, 1x1 128 -> 512       S/4 -> S/8
    head     global average pool; linear 512 -> 256, ReLU, batch norm; linear 256 -> classes

Every convolution has a bias and is followed by ReLU. 577,636 parameters at 100 classes.

The write-up gives no widths for the skip blocks and the hidden layer and contradicts itself on the last pool. Ours:

  - skip blocks are bottlenecks of width 32. A block's ends have 256 channels whatever its middle, so a narrow middle
    is where four blocks stay cheap: together they multiply 105 M times an image of 128 px, beside SimpleNet's 160 M;
    at block2's width of 64 they would take 285 M. They cost memory all the same: training keeps two tensors of 256
    channels for each, the last ReLU's and the sum.
  - the hidden layer has 256 units, half of the features it sees: a third of the parameters of 512.
  - the last pool is SimpleNet's global average, so that every image size has the same head.
"""

from torch import Tensor, nn

from models.simplenet import GlobalAverage, bottleneck


class CustomNet(nn.Module):
    """x (N, 3, S, S) float -> logits (N, num_classes), for any S >= 8; training needs N >= 2, for batch norm."""

    def __init__(self, num_classes: int = 100, conv: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        self.block1 = nn.Sequential(conv(3, 64, 7, stride=2, padding=3), nn.ReLU(inplace=True), nn.BatchNorm2d(64))
        self.block2 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *bottleneck(conv, 64, 64, 256), nn.BatchNorm2d(256))
        self.skips = nn.Sequential(*(SkipBlock(conv, 256, 32) for _ in range(4)))
        self.block3 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *bottleneck(conv, 256, 128, 512))
        self.pool = GlobalAverage()
        self.head = nn.Sequential(
            nn.Linear(512, 256), nn.ReLU(inplace=True), nn.BatchNorm1d(256), nn.Linear(256, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.skips(self.block2(self.block1(x)))  # (N, 256, S/4, S/4)
        x = self.block3(x)  # (N, 512, S/8, S/8)
        return self.head(self.pool(x).flatten(1))


class SkipBlock(nn.Module):
    """x (N, channels, H, W) -> x + norm(bottleneck(x)), of the same shape."""

    def __init__(self, conv: type[nn.Conv2d], channels: int, width: int):
        super().__init__()
        self.branch = nn.Sequential(*bottleneck(conv, channels, width, channels), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        # The branch's in-place ReLUs write into results of its convolutions, never into x.
        return x + self.branch(x)
