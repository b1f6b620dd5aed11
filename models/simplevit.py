"""SimpleViT: a small vision transformer whose blocks attend in turn within windows and everywhere.

    patch    conv of kernel = stride = S/8, 3 -> 192, plus a learned position        (N, 3, S, S) -> (N, 8, 8, 192)
    blocks   4 times x + drop(attention(norm(x))), then x + drop(MLP(norm(x)))
             attention has 4 heads; in blocks 0 and 2 within windows of 4x4 tokens, in 1 and 3 over all 8x8
             MLP 192 -> 768, GELU, 768 -> 192
             drop is stochastic depth (Huang et al. 2016), its rate rising linearly from 0 to 0.1
    head     average over the tokens, norm, linear 192 -> classes

norm is LayerNorm. The grid is 8x8 whatever the image size. At 128 px and 100 classes 1,959,076 parameters; other sizes
change only the patch. Linear weights and positions start as a normal of deviation 0.02 cut off at 2, biases at 0.

Tokens lie channels-last, (N, 8, 8, 192) contiguous: the layout in which a channels-last convolution leaves them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchvision.ops import StochasticDepth

GRID = 8  # tokens a side
WINDOW = 4  # tokens a side of a local window
WIDTH = 192
HEADS = 4
DEPTH = 4
HIGHEST_DROP = 0.1


class SimpleViT(nn.Module):
    """x (N, 3, image_size, image_size) float -> logits (N, num_classes).

    Raises ValueError for an image size that is no multiple of 8.
    """

    def __init__(self, num_classes: int = 100, conv: type[nn.Conv2d] = nn.Conv2d, image_size: int = 128):
        super().__init__()
        if image_size < GRID or image_size % GRID:
            raise ValueError(
                f"image size {image_size} does not fit: simplevit cuts images into {GRID}x{GRID} patches and needs a "
                f"multiple of {GRID}"
            )
        patch = image_size // GRID
        self.patch = conv(3, WIDTH, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, GRID, GRID, WIDTH))
        windows = [WINDOW if block % 2 == 0 else GRID for block in range(DEPTH)]
        drops = [HIGHEST_DROP * block / (DEPTH - 1) for block in range(DEPTH)]
        self.blocks = nn.Sequential(*map(Block, windows, drops))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1).contiguous()  # (N, GRID, GRID, WIDTH)
        x = self.blocks(x + self.position)
        return self.head(self.norm(x.mean((1, 2))))


class Block(nn.Module):
    """x (N, GRID, GRID, WIDTH) -> the same shape; `window` as in Attention, `drop` the rate of stochastic depth."""

    def __init__(self, window: int, drop: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention(window)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = StochasticDepth(drop, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Self-attention of HEADS heads within windows of `window` x `window` tokens; a window of GRID is all of them.

    x (N, GRID, GRID, WIDTH) -> the same shape.
    """

    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        side, across = self.window, GRID // self.window
        x = x.view(-1, across, side, across, side, WIDTH).transpose(2, 3)
        x = x.reshape(-1, side * side, WIDTH)  # (N*windows, tokens, WIDTH)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        x = scaled_dot_product_attention(q, k, v)  # (N*windows, HEADS, tokens, WIDTH/HEADS)
        x = self.project(x.transpose(1, 2).flatten(2))
        x = x.view(-1, across, across, side, side, WIDTH).transpose(2, 3)
        return x.reshape(-1, GRID, GRID, WIDTH)
