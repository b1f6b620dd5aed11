"""Training augmentation of a whole batch at once: one affine resampling and one normalisation, on any device.

In the write-up's order an image is flipped, its channels are scaled, it is rotated and cropped to the square inscribed
in the rotated one, and a random crop of that is resized. The geometry is an affine map from the pixels of the result
to those of the source, so the four steps are one matrix an image, and the image is resampled once instead of twice.
Channel factors commute with the resampling and are folded into the normalisation.

Coordinates are those of torch.nn.functional.affine_grid with align_corners=False: -1 ... 1 from edge to edge.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CANDIDATES = 10  # crops drawn an image; the first that fits is taken, as in torchvision's RandomResizedCrop
# Images augmented at a time on a CPU, whose cache then still holds what one pass leaves to the next; by fewer, threads
# wait for each other more often.
CHUNK = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What may be done to a training image; with all of it off, its centre is cropped."""

    flip: bool
    """Left to right, one image in two."""
    colour: float
    """Each channel is multiplied by 1 - colour ... 1 + colour, and not clamped at white: a clamp would be a pass over
    the batch for the few pixels that are brighter than white by at most this."""
    rotate: float
    """By -rotate ... rotate degrees."""
    crop_area: float | None
    """Least share of the area that a random crop keeps; None crops the centre, unscaled."""
    crop_ratio: float
    """Width over height of the random crop: 1 - crop_ratio ... 1 + crop_ratio, uniform in its logarithm."""

    @property
    def resamples(self) -> bool:
        """Whether any of it moves pixels by less than whole ones."""
        return bool(self.rotate) or self.crop_area is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What was drawn for a batch of B images."""

    flip: Tensor
    """(B,) bool."""
    colour: Tensor
    """(B, 3), factors."""
    angle: Tensor
    """(B,), radians."""
    size: Tensor
    """(B, 2), width and height of the crop as shares of the square it is taken from."""
    centre: Tensor
    """(B, 2), x and y of the crop's centre in that square, -1 ... 1."""

    def __getitem__(self, chosen: slice) -> "Draws":
        """Those of some of the images."""
        return self._each(lambda values: values[chosen])

    def to(self, device: torch.device) -> "Draws":
        return self._each(lambda values: values.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        return Draws(**{name: change(getattr(self, name)) for name in self.__slots__})


def draw(count: int, augmentation: Augmentation, random: torch.Generator, *, centre_share: float) -> Draws:
    """Draws for `count` images; `centre_share` is the side of a centre crop as a share of the stored side."""
    uniform = torch.rand(count, 7 + 2 * CANDIDATES, generator=random)  # one call, so that no setting shifts another
    angle = math.radians(augmentation.rotate) * (2 * uniform[:, 4] - 1)
    if augmentation.crop_area is None:
        size, centre = torch.full((count, 2), centre_share), torch.zeros(count, 2)
    else:
        size = crop_sizes(uniform[:, 7:].view(count, 2, CANDIDATES), augmentation)
        centre = (1 - size) * (2 * uniform[:, 5:7] - 1)
    return Draws(
        flip=uniform[:, 0] < 0.5 if augmentation.flip else torch.zeros(count, dtype=torch.bool),
        colour=1 + augmentation.colour * (2 * uniform[:, 1:4] - 1),
        angle=angle, size=size, centre=centre,
    )


def crop_sizes(uniform: Tensor, augmentation: Augmentation) -> Tensor:
    """(B, 2, CANDIDATES) in 0..1 -> (B, 2): width and height by torchvision's rule, in shares of the whole.

    Area uniform, aspect ratio log-uniform; the first of the candidates that fits, or the whole where none does.
    """
    least = augmentation.crop_area
    low, high = math.log(1 - augmentation.crop_ratio), math.log(1 + augmentation.crop_ratio)
    area = least + (1 - least) * uniform[:, 0]
    ratio = (low + (high - low) * uniform[:, 1]).exp()
    sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1)  # (B, 2, CANDIDATES)
    fits = (sizes <= 1).all(dim=1)
    first = fits.int().argmax(dim=1)  # of equal ones, argmax finds the first
    chosen = sizes.gather(2, first[:, None, None].expand(-1, 2, 1)).squeeze(2)
    return torch.where(fits.any(dim=1)[:, None], chosen, torch.ones(()))


def matrices(draws: Draws) -> Tensor:
    """(B, 2, 3): from the coordinates of the result to those of the stored square.

    From the result back: into the crop, into the inscribed square, turned, mirrored.
    """
    cos, sin = draws.angle.cos(), draws.angle.sin()
    inscribed = 1 / (cos.abs() + sin.abs())  # half side of the largest upright square inside the turned one
    scale = inscribed[:, None] * draws.size  # (B, 2)
    shift = inscribed[:, None] * draws.centre
    mirror = 1 - 2 * draws.flip.to(cos.dtype)
    row_x = torch.stack([cos * scale[:, 0], -sin * scale[:, 1], cos * shift[:, 0] - sin * shift[:, 1]], dim=1)
    row_y = torch.stack([sin * scale[:, 0], cos * scale[:, 1], sin * shift[:, 0] + cos * shift[:, 1]], dim=1)
    return torch.stack([mirror[:, None] * row_x, row_y], dim=1)


def sampling_grid(theta: Tensor, *, out: Tensor) -> Tensor:
    """(B, 2, 3) -> `out`, (B, side, side, 2): the source's x and y for each pixel of the result.

    torch.nn.functional.affine_grid's values by broadcasting: a fraction of its time on a CPU, the same for an image
    whatever its batch, and free of the matrix product that TF32, where it is switched on, would round.
    """
    side = out.shape[1]
    centres = (2 * torch.arange(side, device=theta.device) + 1) / side - 1
    row = theta[:, None, :, 0] * centres[:, None] + theta[:, None, :, 2]  # (B, side, 2)
    slope = theta[:, None, :, 1].expand_as(row)
    # x and y of a row as one axis of 2 * side: broadcasting over columns instead has inner loops of two elements.
    row, slope = row.flatten(1)[:, None], slope.flatten(1)[:, None]
    torch.addcmul(row, slope, centres[:, None], out=out.view(-1, side, 2 * side))
    return out


def augment_and_normalise(
    images: Tensor, draws: Draws, augmentation: Augmentation, mean: Tensor, std: Tensor, *, out: Tensor
) -> Tensor:
    """(B, C, S, S) uint8 -> `out`, (B, 3, image_size, image_size) float32 in any memory format."""
    step = CHUNK if images.device.type == "cpu" else len(images)
    side = out.shape[-1]
    theta = matrices(draws)
    scratch = new_scratch(images[:step], side) if augmentation.resamples else None
    for start in range(0, len(images), step):
        some = slice(start, start + step)
        if scratch:
            x = resample(images[some], theta[some], *scratch)
        else:
            x = crop_and_flip(images[some], draws.flip[some], side)
        normalise(x, mean, std, draws.colour[some], out=out[some])
    return out


def new_scratch(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """What `resample` works in: (B, C, S, S) and (B, side, side, 2) float32.

    Every slice of a batch uses the same: fresh memory comes from the system page by page, which takes as long as the
    work in it.
    """
    return torch.empty_like(images, dtype=torch.float32), torch.empty(len(images), side, side, 2, device=images.device)


def resample(images: Tensor, theta: Tensor, pixels: Tensor, grid: Tensor) -> Tensor:
    """(B, C, S, S) uint8, (B, 2, 3) -> (B, C, side, side) float32, pixels 0..255; in the first B of `new_scratch`."""
    count = len(images)
    pixels = pixels[:count].copy_(images)
    grid = sampling_grid(theta, out=grid[:count])
    # Bilinear without antialiasing: the stored side is 1.125 times the result's, too little to alias visibly.
    return F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")


def crop_and_flip(images: Tensor, flip: Tensor, side: int) -> Tensor:
    """(B, C, S, S), (B,) bool -> (B, C, side, side): the centres, some of them mirrored; nothing is resampled."""
    x = centre_crop(images, side)
    return torch.where(flip[:, None, None, None], x.flip(3), x)


def normalise(x: Tensor, mean: Tensor, std: Tensor, colour: Tensor | None = None, *, out: Tensor) -> Tensor:
    """(x * colour - mean) / std; x (B, C, H, W) pixels 0..255, C 1 or 3 -> `out`, (B, 3, H, W).

    mean, std   (3,), of pixels 0..1
    colour      (B, 3) factors, or None
    """
    scale = (1 if colour is None else colour) / (255 * std)  # (3,) or (B, 3)
    scaled = torch.mul(x, scale.view(-1, 3, 1, 1)).sub_((mean / std).view(3, 1, 1))
    return out.copy_(scaled)  # arithmetic straight into another memory format takes twice as long on a CPU


def centre_crop(images: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` pixels, a view."""
    start = (images.shape[-1] - side) // 2
    return images[:, :, start : start + side, start : start + side]
