"""Square: held against the paper's algorithm written image by image, and against models whose gradients mislead."""

import contextlib
import math

import pytest
import torch
from torch import nn

import attacks
from attacks import attack_report, square
from attacks.ball import make_ball
from attacks.square import side_length

EPSILON, QUERIES = 0.03, 60
BOUNDS = 0.1, 0.9  # inside the images' own range, so that they cut
PER_CHANNEL = torch.tensor([0.06, 0.02], dtype=torch.float64).view(2, 1, 1)


class Asked(nn.Module):
    """Counts what a model is asked, image by image, by a pixel that no attack may change; fails at a chosen call."""

    def __init__(self, model, fails_at=math.inf):
        super().__init__()
        self.model, self.fails_at, self.calls, self.names = model, fails_at, 0, []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not any(module.training for module in self.modules())
        torch.rand(3)
        self.calls += 1
        if self.calls == self.fails_at:
            raise ArithmeticError("made to fail")
        self.names += x[:, 0, 0, 0].tolist()
        return self.model(x)


@pytest.fixture
def model():
    """(N, 2, 8, 10) -> (N, 5), with a bias by which no class is rare among the images."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(),
        nn.Linear(24, 5),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        model[-1].bias -= model(pixels()).mean(0)
    return model


def pixels():
    return torch.rand(24, 2, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def images(model):
    """(x, the model's own predictions but for two images that it gets wrong)."""
    x = pixels()
    y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return x, y


def margin_of(model, image, label):
    with torch.no_grad():
        logits = model(image[None])[0]
    return (logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).max()).item()


def drawn(shape, num_queries, p, seed):
    """The stripes' signs [N, C, 1, W], and (side, top [N], left [N], signs [N, C]) of each square."""
    generator = torch.Generator().manual_seed(seed)
    N, C, H, W = shape
    stripes = 2 * torch.randint(2, (N, C, 1, W), generator=generator).double() - 1
    squares = []
    for i in range(num_queries - 1):
        side = side_length(i, num_queries, p, H, W)
        top = torch.randint(H - side + 1, (N, 1, 1, 1), generator=generator).flatten()
        left = torch.randint(W - side + 1, (N, 1, 1, 1), generator=generator).flatten()
        squares.append((side, top, left, 2 * torch.randint(2, (N, C, 1, 1), generator=generator).double() - 1))
    return stripes, squares


def by_the_paper(model, x, label, epsilon, bounds, stripes, squares):
    """Algorithms 1 and 2 for one image; returns its margins, clean one first, and the adversarial image."""

    def project(adv):
        return torch.minimum(torch.maximum(adv, x - epsilon), x + epsilon).clamp(*bounds)

    best = project(x + stripes * epsilon)
    lowest = margin_of(model, best, label)
    margins = [margin_of(model, x, label), lowest]
    for side, top, left, signs in squares:
        if lowest < 0:
            break
        delta = torch.zeros_like(x)
        delta[:, top : top + side, left : left + side] = 1
        new = project(best + delta * signs * 2 * epsilon)
        reached = margin_of(model, new, label)
        if reached < lowest:
            best, lowest = new, reached
        margins.append(lowest)
    return margins, best


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("epsilon", [EPSILON, PER_CHANNEL], ids=["number", "per-channel"])
@pytest.mark.parametrize("p", [0.8, 0.05])
def test_every_image_goes_the_papers_way(p, epsilon, bounds, model, images):
    x, y = images
    x = x.clamp(*(bounds or (0, 1)))
    report = square(
        model, x, y, num_queries=QUERIES, epsilon=epsilon, p=p, bounds=bounds,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    stripes, squares = drawn(x.shape, QUERIES, p, seed=5)
    wrong = model(x).argmax(1) != y
    assert wrong[:2].all()
    for n in (~wrong).nonzero().flatten().tolist():
        own = [(side, top[n], left[n], signs[n]) for side, top, left, signs in squares]
        margins, adversarial = by_the_paper(model, x[n], y[n], epsilon, bounds or (-9, 9), stripes[n], own)
        torch.testing.assert_close(report.adversarial[n], adversarial, rtol=0, atol=1e-12)
        asked = len(margins)
        assert report.forwards[n] == asked
        expected = torch.tensor(margins, dtype=x.dtype)
        torch.testing.assert_close(report.loss[:asked, n], expected, rtol=0, atol=1e-12)
        assert report.loss[asked:, n].isnan().all()
    # Fooled by stripes, fooled by squares, and not fooled: or the case would not try them all.
    assert {2, QUERIES + 1} < set(report.forwards.tolist())


def test_squares_shrink_as_the_paper_has_it():
    # 0.64 of 200 x 200 pixels is a square of 160, and of 128 where it has been halved k times 160 / sqrt(2 ** k).
    sides = [side_length(i, 10_000, 0.64, 200, 200) for i in range(10_000)]
    starts = [i for i in range(1, 10_000) if sides[i] != sides[i - 1]]
    assert starts == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert [sides[i] for i in (0, *starts)] == [160, 113, 80, 57, 40, 28, 20, 14, 10, 7]
    assert [side_length(i, 100, 0.64, 200, 200) for i in (0, 1, 2, 3, 99)] == [160, 80, 80, 57, 7]
    assert side_length(0, 100, 1.0, 8, 32) == side_length(0, 100, 1.0, 32, 8) == 8  # no longer than the shorter side
    assert side_length(99, 100, 0.8, 8, 8) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize(
    "epsilon", [EPSILON, PER_CHANNEL, torch.linspace(0, 0.06, 24).view(24, 1, 1, 1)],
    ids=["number", "per-channel", "per-image"],
)  # fmt: skip
def test_every_pixel_is_at_an_end_of_the_ball_as_projected(epsilon, bounds, dtype, model, images):
    x, y = images[0].to(dtype), images[1]
    report = square(model.to(dtype), x, y, num_queries=20, epsilon=epsilon, bounds=bounds)
    ball = make_ball("linf", epsilon, bounds, x)
    low, high = (ball.project(x + sign * ball.epsilon, x) for sign in (-1, 1))
    adversarial = report.adversarial
    assert adversarial.dtype == dtype
    assert torch.equal(adversarial[:2], x[:2])
    assert ((adversarial == low) | (adversarial == high))[2:].all()
    assert (adversarial == low)[2:].any()
    assert (adversarial == high)[2:].any()


def test_the_report_tells_what_happened(images, model):
    x, y = images
    epsilon = torch.full(x.shape[1:], EPSILON)
    epsilon[0, 0, 0] = 0
    asked = Asked(model).eval()
    report = square(asked, x, y, num_queries=QUERIES, epsilon=epsilon)
    assert report.forwards.tolist() == [asked.names.count(name) for name in x[:, 0, 0, 0].tolist()]
    assert report.forwards[:2].tolist() == [1, 1]
    assert report.forwards[2:].min() < QUERIES + 1 == report.forwards.max()
    assert not report.backwards.any()
    assert report.zero_gradient.shape == (QUERIES, 24)
    assert report.zero_gradient.isnan().all()
    with torch.no_grad():
        torch.testing.assert_close(report.clean_logits, model(x))
        torch.testing.assert_close(report.logits, model(report.adversarial))
    assert torch.equal(report.success, report.logits.argmax(1) != y)
    assert 2 < report.success.sum() < 24

    # The curve: of x, then never rising, to the margin of the image handed back, and NaN once it was reached.
    assert report.loss.shape == (QUERIES + 1, 24)
    assert torch.equal(report.loss.isfinite().sum(0), report.forwards)
    for n in range(24):
        curve = report.loss[: report.forwards[n], n]
        assert (curve[2:] <= curve[1:-1]).all()
        assert (curve[:-1] >= 0).all()
        assert (curve[-1] < 0) == report.success[n]
        assert curve[-1].item() == pytest.approx(margin_of(model, report.adversarial[n], y[n]), abs=1e-12)
    assert (report.loss.diff(dim=0)[1:] < 0).any(0).sum() > 4  # squares did help


@pytest.mark.parametrize("fails_at", [math.inf, 1, 3], ids=["returns", "fails", "fails-later"])
def test_model_is_left_as_it_was_found(fails_at, model, images):
    def state():
        tensors = [*asked.parameters(), *asked.buffers(), *(p.grad for p in asked.parameters() if p.grad is not None)]
        return (
            [module.training for module in asked.modules()], [p.requires_grad for p in asked.parameters()],
            [id(p.grad) for p in asked.parameters()], [tensor.tolist() for tensor in tensors],
            torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
        )  # fmt: skip

    x, y = images
    asked = Asked(model, fails_at).train()
    model[0].eval()  # a layer frozen inside a model that trains
    model[0].weight.requires_grad_(False)
    model(x).sum().backward()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        before = state()
        failing = pytest.raises(ArithmeticError, match="made to fail")
        with contextlib.nullcontext() if fails_at == math.inf else failing:
            assert not square(asked, x, y, num_queries=5, epsilon=EPSILON).adversarial.requires_grad
        assert state() == before
    assert asked.calls >= min(fails_at, 3)
    assert torch.equal(x, images[0])
    assert x.grad is None


def test_a_first_layer_in_place_changes_nothing(model, images):
    class Halved(nn.Module):
        def forward(self, x):
            return x.mul_(0.5)

    x, y = images
    inplace = square(nn.Sequential(Halved(), model), 2 * x, y, epsilon=2 * EPSILON)  # powers of 2: no rounding
    plain = square(model, x, y, epsilon=EPSILON)
    assert torch.equal(inplace.adversarial, 2 * plain.adversarial)
    assert torch.equal(x, images[0])


def test_the_same_generator_gives_the_same_images(model, images):
    x, y = images
    first, second = (square(model, x, y, num_queries=10, epsilon=EPSILON) for _ in range(2))
    assert torch.equal(first.adversarial, second.adversarial)
    generator = torch.Generator().manual_seed(0)
    third, fourth = (square(model, x, y, num_queries=10, epsilon=EPSILON, generator=generator) for _ in range(2))
    assert torch.equal(first.adversarial, third.adversarial)
    assert not torch.equal(first.adversarial, fourth.adversarial)  # of its next numbers


def test_an_image_does_not_depend_on_how_the_others_fare(model, images):
    x, y = images
    report = square(model, x, y, epsilon=EPSILON)
    others = y.clone()
    others[2::2] = (y[2::2] + 1) % 5  # wrong now as they come, and left alone
    fewer = square(model, x, others, epsilon=EPSILON)
    assert (fewer.forwards[2::2] == 1).all()
    assert torch.equal(fewer.adversarial[3::2], report.adversarial[3::2])
    assert torch.equal(fewer.forwards[3::2], report.forwards[3::2])


def test_it_fools_more_than_random_corners_of_the_ball(model, images):
    x, y = images
    generator = torch.Generator().manual_seed(0)
    corners = torch.zeros(24, dtype=torch.bool)
    for _ in range(QUERIES):
        noise = 2 * torch.randint(2, x.shape, generator=generator) - 1
        with torch.no_grad():
            corners |= model(x + EPSILON * noise).argmax(1) != y
    report = square(model, x, y, num_queries=QUERIES, epsilon=EPSILON)
    assert report.success.sum() > 1.5 * corners.sum()


class Scaled(nn.Module):
    """The same predictions, with logits so large that the cross-entropy's gradient is 0 in float32."""

    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model.float(), factor

    def forward(self, x):
        return self.factor * self.model(x)


class Rounded(nn.Module):
    """A layer without a gradient: pixels in 16 grey levels."""

    def forward(self, x):
        return (15 * x).round() / 15


@pytest.mark.parametrize("mask", ["logits", "pixels"])
def test_it_fools_models_whose_gradients_are_masked(mask, model, images):
    x, y = images[0].float(), images[1]
    masked = Scaled(model, 1e6) if mask == "logits" else nn.Sequential(Rounded(), model.float())
    with torch.no_grad():
        wrong = masked(x).argmax(1) != y
    white = attack_report(masked, x, "untargeted", y, num_steps=20, step_size=EPSILON / 8, epsilon=EPSILON)
    black = square(masked, x, y, epsilon=EPSILON)
    assert torch.equal(white.success, wrong)
    assert (white.zero_gradient[:, ~wrong] == 1).all()
    assert black.success.sum() > 8 + wrong.sum()


def test_a_margin_that_is_no_number_is_never_kept(model, images):
    class Sometimes(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return model(x) * (math.nan if self.calls in (2, 5) else 1)  # of the stripes, and of a square

    x, y = images
    report = square(Sometimes(), x, y, epsilon=EPSILON)
    assert report.logits.isfinite().all()
    assert report.success.sum() > 6


def test_a_tie_neither_fools_nor_is_taken(model, images):
    class Undecided(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 5)  # a margin of exactly 0, whatever is asked

    x, y = images
    one, many = (square(Undecided(), x, y, num_queries=queries, epsilon=EPSILON) for queries in (1, 9))
    assert (many.forwards == 10).all()
    assert not many.success.any()
    assert torch.equal(many.adversarial, one.adversarial)  # still the stripes


def test_no_images_and_no_room(model, images):
    x, y = images
    none = square(model, x[:0], y[:0])
    assert none.adversarial.shape == (0, 2, 8, 10)
    still = square(model, x, y, num_queries=3, epsilon=0.0)
    assert torch.equal(still.adversarial, x)
    assert still.success.sum() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_fools_too(model, images):
    x, y = images
    report = square(model.cuda(), x.cuda(), y, epsilon=EPSILON)
    assert report.adversarial.is_cuda
    assert report.success.sum() > 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"p": 0.0}, "p must be a share of the pixels, above 0 and at most 1, got 0.0"),
        ({"p": 1.5}, "p must be .* got 1.5"),
        ({"p": math.nan}, "p must be .* got nan"),
        ({"epsilon": -0.1}, "epsilon must be at least 0, got -0.1"),
        ({"epsilon": torch.ones(3, 1, 1)}, "epsilon of shape .* does not broadcast"),
        ({"bounds": (1, 0)}, r"bounds must be \(low, high\) with low <= high, got \(1, 0\)"),
        ({"y": torch.zeros(3).long()}, "24 integer labels"),
        ({"y": torch.zeros(24)}, "24 integer labels"),
        ({"y": None}, "give them as y"),
        ({"x": torch.zeros(2, 8, 10)}, r"x must be \(N, C, H, W\)"),
        ({"x": torch.zeros(24, 2, 8, 10).half()}, "float32 or float64"),
    ],
)
def test_mistakes_are_named(arguments, message, model, images):
    x, y = images
    with pytest.raises(ValueError, match=message):
        square(model, **{"x": x, "y": y} | arguments)


def test_it_is_exported():
    assert "square" in attacks.__all__
