"""Augmentation of a batch at once, held against one image at a time, and one step after another."""

import dataclasses
import math

import pytest
import torch
from torchvision.transforms import v2

from train.augment import (
    CHUNK,
    Augmentation,
    Draws,
    augment_and_normalise,
    centre_crop,
    crop_and_flip,
    crop_sizes,
    draw,
    matrices,
    new_scratch,
    normalise,
    resample,
    sampling_grid,
)

OFF = Augmentation(flip=False, colour=0.0, rotate=0.0, crop_area=None, crop_ratio=0.0)
WRITEUP = Augmentation(flip=True, colour=0.15, rotate=15.0, crop_area=0.25, crop_ratio=0.2)
SIDE, SIZE = 144, 128
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws_of(augmentation, count=64, seed=0):
    return draw(count, augmentation, generator(seed), centre_share=SIZE / SIDE)


def one_draw(*, flip=False, angle=0.0, size=(1.0, 1.0), centre=(0.0, 0.0)):
    return Draws(
        flip=torch.tensor([flip]), colour=torch.ones(1, 3), angle=torch.tensor([angle]),
        size=torch.tensor([size]), centre=torch.tensor([centre]),
    )


def resampled(images, draws, size):
    return resample(images, matrices(draws), *new_scratch(images, size))


def step_by_step(point, draws, n):
    """Where the value at `point` of the result (-1..1) comes from, by undoing the write-up's steps one by one."""
    x, y = point
    width, height = draws.size[n].tolist()
    x, y = x * width + draws.centre[n, 0].item(), y * height + draws.centre[n, 1].item()  # out of the resized crop
    angle = draws.angle[n].item()
    side = 1 / (abs(math.cos(angle)) + abs(math.sin(angle)))
    x, y = x * side, y * side  # out of the inscribed square
    x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y  # turned back
    return (-x if draws.flip[n] else x), y  # mirrored back


@pytest.mark.parametrize(
    "augmentation",
    [
        pytest.param(dataclasses.replace(OFF, rotate=15.0), id="rotate"),
        pytest.param(dataclasses.replace(OFF, crop_area=0.25, crop_ratio=0.2), id="crop"),
        pytest.param(dataclasses.replace(OFF, rotate=15.0, flip=True), id="rotate-and-flip"),
        pytest.param(WRITEUP, id="writeup"),
    ],
)
def test_one_matrix_is_the_steps_one_after_another(augmentation):
    draws = draws_of(augmentation)
    theta = matrices(draws).double()
    for n in range(len(theta)):
        for point in ((0.0, 0.0), (-1.0, 1.0), (0.3, -0.7), (1.0, 1.0)):
            mapped = theta[n] @ torch.tensor([*point, 1.0], dtype=torch.float64)
            assert mapped.tolist() == pytest.approx(step_by_step(point, draws, n), abs=1e-5)


def test_a_batch_samples_each_image_where_its_steps_say():
    """Pixels that are a linear function of their coordinates are resampled exactly."""
    draws = draws_of(WRITEUP, 16)
    columns = torch.arange(SIDE).expand(SIDE, SIDE)
    image = torch.stack([columns, columns.T, 255 - columns]).to(torch.uint8)
    result = resampled(image.expand(16, -1, -1, -1), draws, SIZE)
    centres = (2 * torch.arange(SIZE, dtype=torch.float64) + 1) / SIZE - 1
    for n in range(16):
        for row, column in ((0, 0), (5, 100), (127, 0), (64, 63), (127, 127)):
            x, y = step_by_step((centres[column].item(), centres[row].item()), draws, n)
            expected = [((value + 1) * SIDE - 1) / 2 for value in (x, y)]
            assert result[n, :2, row, column].tolist() == pytest.approx(expected, abs=1e-2)
            assert result[n, 2, row, column].item() == pytest.approx(255 - expected[0], abs=1e-2)


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        pytest.param(one_draw(), lambda image: image, id="nothing"),
        pytest.param(one_draw(flip=True), lambda image: image.flip(2), id="flip"),
        # As torchvision's rotate: counter-clockwise, and the flip comes first.
        pytest.param(one_draw(angle=math.pi / 2), lambda image: image.rot90(1, (1, 2)), id="quarter-turn"),
        pytest.param(one_draw(angle=-math.pi / 2), lambda image: image.rot90(-1, (1, 2)), id="quarter-turn-back"),
        pytest.param(one_draw(angle=math.pi), lambda image: image.flip(1, 2), id="half-turn"),
        pytest.param(
            one_draw(flip=True, angle=math.pi / 2), lambda image: image.flip(2).rot90(1, (1, 2)), id="flip-and-turn"
        ),
        # Every pixel doubled: a quarter and three quarters of the way between two of the source.
        pytest.param(
            one_draw(size=(0.5, 0.5), centre=(0.5, -0.5)),
            lambda image: torch.nn.functional.interpolate(image[None], scale_factor=2, mode="bilinear")[0, :, :16, 16:],
            id="top-right-quarter",
        ),
    ],
)
def test_steps_that_can_be_written_without_resampling(draws, expected):
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=generator())
    result = resampled(image[None], draws, 16)[0]
    inside = slice(1, -1)  # a crop's rim is drawn from the pixels beside it, where interpolate's is the image's end
    torch.testing.assert_close(
        result[:, inside, inside], expected(image.float())[:, inside, inside], rtol=0, atol=1e-2
    )


def test_the_grid_is_affine_grids():
    theta = matrices(draws_of(WRITEUP, 5))
    expected = torch.nn.functional.affine_grid(theta, (5, 1, SIZE, SIZE), align_corners=False)
    torch.testing.assert_close(sampling_grid(theta, out=torch.empty_like(expected)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("augmentation", [OFF, dataclasses.replace(OFF, flip=True), WRITEUP])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_batch(augmentation, channels):
    """To the bit: processes that share a batch must see what one sees."""
    count = 2 * CHUNK + 3
    images = torch.randint(256, (count, channels, 36, 36), dtype=torch.uint8, generator=generator())
    draws = draw(count, augmentation, generator(), centre_share=32 / 36)

    def run(chosen):
        out = torch.full((len(images[chosen]), 3, 32, 32), math.nan)
        return augment_and_normalise(images[chosen], draws[chosen], augmentation, MEAN, STD, out=out)

    together = run(slice(None))
    assert together.isfinite().all()
    for n in range(count):
        assert torch.equal(run(slice(n, n + 1))[0], together[n])


@pytest.mark.parametrize("seed", range(3))
def test_the_inscribed_square_keeps_all_samples_inside_the_image(seed):
    theta = matrices(draws_of(WRITEUP, 500, seed))
    corners = torch.tensor([[-1.0, -1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, 1]])
    assert (theta @ corners.T).abs().max() <= 1 + 1e-6


def test_agrees_with_torchvisions_transforms_one_image_at_a_time():
    """On a smooth image: theirs resamples twice, with an antialiasing filter, and whole pixels for the crops."""
    t = torch.linspace(0, 2 * math.pi, SIDE)
    x, y = t[None], t[:, None]
    image = 127 + 60 * torch.stack([x.sin() + y.cos(), (x + y).sin(), x.cos() * y.sin()])
    draws = draws_of(WRITEUP, 12)
    ours = resampled(image.round().to(torch.uint8).expand(12, -1, -1, -1), draws, SIZE)
    functional = v2.functional
    for n in range(12):
        theirs = functional.horizontal_flip(image) if draws.flip[n] else image
        angle = draws.angle[n].item()
        theirs = functional.rotate(theirs, math.degrees(angle), v2.InterpolationMode.BILINEAR)
        inner = SIDE / (abs(math.cos(angle)) + abs(math.sin(angle)))
        width, height = (inner * draws.size[n]).tolist()
        left, top = (SIDE - torch.tensor([width, height]) + inner * draws.centre[n]).div(2).tolist()
        theirs = functional.resized_crop(
            theirs, round(top), round(left), round(height), round(width), [SIZE, SIZE], antialias=False
        )
        difference = (theirs - ours[n]).abs()
        assert difference.mean() < 2.0, n
        assert difference.max() < 8.0, n


def test_crops_have_the_areas_and_ratios_asked_for():
    sizes = crop_sizes(torch.rand(20_000, 2, 10, generator=generator()), WRITEUP)
    area, ratio = sizes.prod(1), sizes[:, 0] / sizes[:, 1]
    assert sizes.max() <= 1
    assert area.min() >= 0.25 - 1e-6
    assert ratio.min() >= 0.8 - 1e-5
    assert ratio.max() <= 1.2 + 1e-5
    # As torchvision draws them, from a square large enough that its whole pixels do not matter.
    torch.manual_seed(0)
    canvas = torch.empty(1, 2000, 2000)
    theirs = [v2.RandomResizedCrop(8, (0.25, 1), (0.8, 1.2)).make_params([canvas]) for _ in range(4000)]
    their_area = torch.tensor([p["height"] * p["width"] / 4e6 for p in theirs])
    their_ratio = torch.tensor([p["width"] / p["height"] for p in theirs])
    for quantile in (0.1, 0.5, 0.9):
        assert area.quantile(quantile).item() == pytest.approx(their_area.quantile(quantile).item(), abs=0.03)
        assert ratio.quantile(quantile).item() == pytest.approx(their_ratio.quantile(quantile).item(), abs=0.03)


def test_where_no_candidate_fits_the_whole_square_is_kept():
    uniform = torch.ones(1, 2, 10)  # area 1 at the most oblong ratio never fits
    assert crop_sizes(uniform, WRITEUP).tolist() == [[1.0, 1.0]]
    uniform[0, :, 7] = 0.5
    assert crop_sizes(uniform, WRITEUP)[0].prod().item() == pytest.approx(0.625)


def test_crops_lie_anywhere_in_the_square():
    draws = draws_of(WRITEUP, 5000)
    room = 1 - draws.size
    assert (draws.centre.abs() <= room + 1e-6).all()
    place = (draws.centre / room)[room.min(1).values > 0.01]
    assert place.min() < -0.99
    assert place.max() > 0.99
    assert place.mean(0).abs().max() < 0.05


def test_flips_angles_and_colours_are_spread_as_asked():
    draws = draws_of(WRITEUP, 5000)
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.03)
    degrees = draws.angle.rad2deg()
    assert (degrees.min().item(), degrees.max().item()) == pytest.approx((-15, 15), abs=0.1)
    assert (draws.colour.min().item(), draws.colour.max().item()) == pytest.approx((0.85, 1.15), abs=1e-3)
    assert draws.colour.mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert abs(torch.corrcoef(draws.colour.T)[0, 1]) < 0.05  # each channel its own


@pytest.mark.parametrize("flip", [False, True])
def test_without_resampling_pixels_are_copied(flip):
    images = torch.randint(256, (20, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator())
    augmentation = dataclasses.replace(OFF, flip=flip)
    draws = draws_of(augmentation, 20)
    assert draws.flip.any() == flip
    for one, image, flipped in zip(crop_and_flip(images, draws.flip, SIZE), images, draws.flip, strict=True):
        centre = image[:, 8:136, 8:136]
        assert torch.equal(one, centre.flip(2) if flipped else centre)


def test_colour_and_normalisation():
    x = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8, generator=generator())
    colour = draws_of(WRITEUP, 4).colour
    for factors in (None, colour):
        result = normalise(x, MEAN, STD, factors, out=torch.empty(4, 3, 5, 5))
        for n in range(4):
            for c in range(3):
                factor = 1 if factors is None else factors[n, c]
                expected = (x[n, c] / 255 * factor - MEAN[c]) / STD[c]
                torch.testing.assert_close(result[n, c], expected, rtol=1e-5, atol=1e-5)


def test_grey_images_become_three_channels():
    x = torch.randint(256, (2, 1, 5, 5), dtype=torch.uint8, generator=generator())
    grey, repeated = (
        normalise(images, MEAN, STD, out=torch.empty(2, 3, 5, 5)) for images in (x, x.expand(-1, 3, -1, -1))
    )
    assert torch.equal(grey, repeated)


def test_the_centre_is_the_centre():
    x = torch.arange(36).view(1, 1, 6, 6)
    assert centre_crop(x, 2).flatten().tolist() == [14, 15, 20, 21]
