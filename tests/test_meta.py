"""Meta tensors in the role of a device against that device: the CPU itself, and CUDA by PyTorch's fake tensors."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import models
from bench.measure.account import Change
from bench.measure.meta import FULL_PRECISION, LOWER_PRECISION, StandIn, in_the_role_of
from bench.measure.tracker import Tracker
from kernels import conv2d, runtime
from kernels.unfold import unfold_conv2d

HALF, BRAIN = torch.float16, torch.bfloat16


class Operators(TorchDispatchMode):
    """Counts the operators that ran, with dtype, shape and strides of each result."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)]
        self.seen[func.overloadpacket.__name__, *((t.dtype, t.shape, t.stride()) for t in tensors)] += 1
        return result


def tensors(shapes, dtype, device):
    return [torch.ones(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


def labels(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.size(0), dtype=torch.long, device=x.device)


def twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w) + F.linear(x, w)


IMAGE, FILTER, BIAS = (2, 4, 5, 5), (4, 4, 3, 3), (4,)
SQUARE = (4, 4)
EVERY, WIDE = (torch.float32, BRAIN, torch.float64), (torch.float32, torch.float64)
# The CPU's autocast leaves bfloat16 alone in layer_norm and softmax, where CUDA's makes float32 of it.
ON_CPU = [
    pytest.param(F.linear, [(2, 4), SQUARE, BIAS], EVERY, id="linear"),
    pytest.param(torch.matmul, [SQUARE] * 2, EVERY, id="matmul"),
    pytest.param(lambda a, b: a @ b, [SQUARE] * 2, EVERY, id="@"),
    pytest.param(lambda x, w, b: F.conv2d(x, w, b, 2), [IMAGE, FILTER, BIAS], EVERY, id="conv2d"),
    pytest.param(conv2d, [IMAGE, FILTER, BIAS], EVERY, id="our-conv2d"),
    pytest.param(unfold_conv2d, [IMAGE, FILTER, BIAS], EVERY, id="unfold_conv2d"),
    pytest.param(F.scaled_dot_product_attention, [(2, 2, 8, 4)] * 3, EVERY, id="attention"),
    pytest.param(lambda x: F.cross_entropy(x, labels(x)), [SQUARE], EVERY, id="cross_entropy"),
    pytest.param(lambda x, w, b: F.layer_norm(x, BIAS, w, b), [SQUARE, BIAS, BIAS], WIDE, id="layer_norm"),
    pytest.param(lambda x: x.softmax(-1), [SQUARE], WIDE, id="softmax"),
    pytest.param(lambda x: F.gelu(x) + x.mean(), [SQUARE], EVERY, id="what-is-left-as-it-is"),
    pytest.param(twice, [SQUARE] * 2, EVERY, id="a-weight-twice-is-cast-once"),
    pytest.param(lambda x, w: twice(x, w.T), [SQUARE] * 2, EVERY, id="its-view-twice-is-cast-twice"),
    pytest.param(lambda x, w: twice(x, (2 * w).detach()), [SQUARE] * 2, EVERY, id="a-frozen-one-too"),
    pytest.param(twice, [SQUARE] * 2, (HALF,), id="a-half-precision-one-too"),
    pytest.param(
        lambda x, w: twice(x, w.detach()[:3].requires_grad_()), [SQUARE] * 2, EVERY, id="a-trained-view-too"
    ),
    pytest.param(lambda x, w: twice(2 * x, w), [SQUARE] * 2, EVERY, id="an-activation-too"),
    pytest.param(
        lambda x, w: conv2d(conv2d(x, w), w), [IMAGE, FILTER], EVERY, id="our-conv2d-casts-a-weight-at-each-call"
    ),
    pytest.param(
        lambda x, w: unfold_conv2d(unfold_conv2d(x, w), w), [IMAGE, FILTER], EVERY, id="unfold_conv2d-likewise"
    ),
]


@pytest.mark.parametrize(("function", "shapes", "dtypes"), ON_CPU)
def test_the_same_operators_run_as_under_autocast_on_the_cpu(function, shapes, dtypes):
    for dtype in dtypes:
        seen = []
        for device, precision in (("cpu", torch.autocast("cpu", BRAIN)), ("meta", StandIn("cpu", amp=BRAIN))):
            operands = tensors(shapes, dtype, device)
            with Operators() as operators:
                with precision:
                    y = function(*operands)
                y.backward(torch.ones_like(y))
            seen.append(operators.seen)
            assert all(t.grad.dtype == dtype for t in operands if t.grad is not None)
        assert seen[0] == seen[1], dtype


@pytest.mark.parametrize(
    ("name", "conv", "size"),
    [("simplevit", "torch", 8), ("resnet18", "torch", 32), ("customnet", "unfold", 16), ("customnet", "triton", 16)],
)
def test_a_models_step_is_the_same_as_under_autocast_on_the_cpu(name, conv, size):
    seen = []
    for device, precision in (("cpu", torch.autocast("cpu", BRAIN)), ("meta", StandIn("cpu", amp=BRAIN))):
        with torch.device(device):
            model, x = models.build(name, conv, 10, size), torch.zeros(2, 3, size, size)
        with Operators() as operators:
            with precision:
                loss = F.cross_entropy(model(x).float(), labels(x))
            loss.backward()
        seen.append(operators.seen)
    assert seen[0] == seen[1]


# How each name of the two lists is called, and with what shapes.
CALLS = {
    "__matmul__": (lambda a, b: a @ b, SQUARE, SQUARE),
    "__rmatmul__": (lambda a, b: b.__rmatmul__(a), SQUARE, SQUARE),
    "__pow__": (lambda a: a**2, SQUARE),
    "__rpow__": (lambda a: 2**a, SQUARE),
    "__rdiv__": (lambda a: 2 / a, SQUARE),
    "__rtruediv__": (lambda a: 2 / a, SQUARE),
    "addbmm": (torch.addbmm, SQUARE, (2, 4, 4), (2, 4, 4)),
    "addmm": (torch.addmm, SQUARE, SQUARE, SQUARE),
    "addmv": (torch.addmv, BIAS, SQUARE, BIAS),
    "addr": (torch.addr, SQUARE, BIAS, BIAS),
    "baddbmm": (torch.baddbmm, (2, 4, 4), (2, 4, 4), (2, 4, 4)),
    "bmm": (torch.bmm, (2, 4, 4), (2, 4, 4)),
    "conv1d": (F.conv1d, (2, 4, 5), (4, 4, 3)),
    "conv2d": (F.conv2d, IMAGE, FILTER),
    "conv3d": (F.conv3d, (*IMAGE, 5), (*FILTER, 3)),
    "conv_transpose1d": (F.conv_transpose1d, (2, 4, 5), (4, 4, 3)),
    "conv_transpose2d": (F.conv_transpose2d, IMAGE, FILTER),
    "conv_transpose3d": (F.conv_transpose3d, (*IMAGE, 5), (*FILTER, 3)),
    "cross_entropy": (lambda a: F.cross_entropy(a, labels(a)), SQUARE),
    "cumprod": (lambda a: a.cumprod(0), SQUARE),
    "cumsum": (lambda a: a.cumsum(0), SQUARE),
    "dist": (torch.dist, SQUARE, SQUARE),
    "group_norm": (lambda a: F.group_norm(a, 2), SQUARE),
    "layer_norm": (lambda a: F.layer_norm(a, BIAS), SQUARE),
    "linalg_vector_norm": (torch.linalg.vector_norm, SQUARE),
    "binary_cross_entropy_with_logits": (
        lambda a, b: F.binary_cross_entropy_with_logits(a, b.detach()), SQUARE, SQUARE,
    ),
    "linalg_multi_dot": (lambda a, b: torch.linalg.multi_dot([a, b]), SQUARE, SQUARE),
    "mv": (torch.mv, SQUARE, BIAS),
    "nll_loss": (lambda a: F.nll_loss(a, labels(a)), SQUARE),
    "pow": (lambda a: torch.pow(a, 2), SQUARE),
    "prelu": (F.prelu, SQUARE, (1,)),
    "renorm": (lambda a: a.renorm(2, 0, 1), SQUARE),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, *[(2, 2, 8, 64)] * 3),
    "unfold_conv2d": (unfold_conv2d, IMAGE, FILTER),
}
CALLS |= {name: (getattr(torch, name), SQUARE, SQUARE) for name in ("cdist", "chain_matmul", "matmul", "mm")}
CALLS |= {name: (getattr(F, name), SQUARE, SQUARE) for name in (
    "cosine_similarity", "kl_div", "l1_loss", "linear", "mse_loss", "smooth_l1_loss",
)}  # fmt: skip
CALLS |= {name: (partial(getattr(F, name), dim=1), SQUARE) for name in (
    "log_softmax", "normalize", "softmax", "softmin",
)}  # fmt: skip
CALLS |= {name: (getattr(torch, name), SQUARE) for name in (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "norm", "prod", "reciprocal",
    "rsqrt", "sinh", "sum", "tan",
)}  # fmt: skip
CALLS["softplus"] = (F.softplus, SQUARE)
NOT_CAST = {
    "add": (torch.add, SQUARE, SQUARE),
    "adaptive_avg_pool2d": (lambda a: F.adaptive_avg_pool2d(a, 1), IMAGE),
    "batch_norm": (lambda a, m, v: F.batch_norm(a, m.detach(), v.detach(), training=True), IMAGE, BIAS, BIAS),
    "gelu": (F.gelu, SQUARE),
    "max_pool2d": (lambda a: F.max_pool2d(a, 2), IMAGE),
    "mean": (torch.mean, SQUARE),
    "unfold": (lambda a: F.unfold(a, 3), IMAGE),
}


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", sorted(CALLS | NOT_CAST))
def test_results_have_the_dtype_that_autocast_gives_on_cuda(name):
    function, *shapes = (CALLS | NOT_CAST)[name]
    for dtype in (torch.float32, HALF, torch.float64):
        with StandIn("sm_80", amp=HALF):
            ours = function(*tensors(shapes, dtype, "meta")).dtype
        with FakeTensorMode():
            torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") does nothing where there is no GPU
            try:
                theirs = function(*tensors(shapes, dtype, "cuda")).dtype
            finally:
                torch.set_autocast_enabled("cuda", False)
        assert ours == theirs, dtype


def test_every_name_of_the_lists_was_tried():
    assert CALLS.keys() == LOWER_PRECISION | FULL_PRECISION


def test_casts_of_parameters_are_kept_until_it_is_closed():
    layer = nn.Linear(64, 64, bias=False, device="meta")  # 16 KiB, and 8 KiB in half precision
    with Tracker("meta") as tracker:
        tracker.watch(layer)
        stand_in = StandIn("sm_80", amp=HALF)
        with torch.no_grad():
            for _ in range(2):
                with stand_in:
                    layer(torch.empty(1, 64, device="meta"))
                    assert tracker.now == 24 * 1024
                assert tracker.now == 16 * 1024
    casts = [entry for entry in tracker.account.entries if isinstance(entry, Change) and entry.nbytes == 8 * 1024]
    assert len(casts) == 2


@pytest.mark.parametrize("amp", [None, HALF], ids=str)
def test_real_tensors_are_left_alone(amp):
    torch.manual_seed(0)
    x, w = torch.randn(2, 2, 8, 8), torch.randn(8, 8)
    half = x.half()

    def run():
        return F.linear(x, w), F.scaled_dot_product_attention(x, x, x), half.sum(-1), conv2d(x, x)

    expected = run()
    with StandIn("sm_80", amp=amp):
        actual = run()
    assert [y.dtype for y in actual] == [y.dtype for y in expected]
    assert all(map(torch.equal, actual, expected))


def test_nothing_is_cast_without_autocast():
    for dtype in (torch.float32, HALF):
        x = torch.empty(4, 4, dtype=dtype, device="meta")
        with StandIn("sm_80"):
            assert F.linear(x, x).dtype == x.softmax(-1).dtype == dtype


EFFICIENT, FLASH = "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_flash_attention"
SHAPE = (2, 2, 128, 16)  # the scores are 8 times as large


def made_by(function) -> dict[str, int]:
    """The operators that made something, and bytes of the largest thing each made."""
    with Tracker("meta") as tracker:
        kept = function()
    del kept
    made = {}
    for entry in tracker.account.entries:
        if isinstance(entry, Change) and entry.operator:
            made[entry.operator] = max(made.get(entry.operator, 0), entry.nbytes)
    return made


@pytest.mark.parametrize(
    ("role", "dtype", "amp", "operator"),
    [
        pytest.param("cpu", torch.float32, None, FLASH + "_for_cpu", id="cpu"),
        pytest.param("cpu", BRAIN, None, FLASH + "_for_cpu", id="cpu-bfloat16"),
        pytest.param("sm_75", torch.float32, None, EFFICIENT, id="t4"),
        pytest.param("sm_75", HALF, None, EFFICIENT, id="t4-half"),
        pytest.param("sm_80", torch.float32, None, EFFICIENT, id="a100-float32"),
        pytest.param("sm_80", HALF, None, FLASH, id="a100-half"),
        pytest.param("sm_90", BRAIN, None, FLASH, id="h100-bfloat16"),
        pytest.param("sm_90", torch.float32, HALF, FLASH, id="h100-autocast"),
        pytest.param("sm_75", torch.float32, HALF, EFFICIENT, id="t4-autocast"),
    ],
)
def test_attention_is_one_operator_that_keeps_no_scores(role, dtype, amp, operator):
    q, k, v = tensors([SHAPE] * 3, dtype, "meta")

    def attention():
        with StandIn(role, amp=amp):
            y = F.scaled_dot_product_attention(q, k, v)
        assert (y.shape, y.dtype) == (q.shape, amp or dtype)
        return y, torch.autograd.grad(y.sum(), (q, k, v))

    made = made_by(attention)
    assert operator in made
    assert operator + "_backward" in made
    assert max(made.values()) <= q.nbytes
    fallen_apart = made_by(lambda: F.scaled_dot_product_attention(q, k, v))
    assert max(fallen_apart.values()) >= 8 * q.nbytes
    assert operator not in fallen_apart


@pytest.mark.parametrize("trained", ["", "q", "k", "v"])
def test_efficient_attention_keeps_its_sums_for_a_backward_pass_alone(trained):
    operands = [torch.empty(SHAPE, device="meta", requires_grad=name == trained) for name in "qkv"]
    with Operators() as operators, StandIn("sm_75"):
        F.scaled_dot_product_attention(*operands)
    ((_, _, (_, sums, _), *_),) = [seen for seen in operators.seen if seen[0] == EFFICIENT.removeprefix("aten.")]
    assert (sums.numel() > 0) is bool(trained)


def test_unknown_roles_are_refused():
    with pytest.raises(ValueError, match="unknown role 'sm_42'; known: cpu, sm_75, "):
        StandIn("sm_42")


@pytest.mark.parametrize(
    ("role", "multiprocessors", "target"),
    [
        pytest.param("cpu", None, runtime.Target("interpreter", 1), id="cpu"),
        pytest.param("cpu", 132, runtime.Target("interpreter", 1), id="cpu-has-none"),
        pytest.param("sm_90", None, runtime.Target("sm_90", 132), id="best-known-gpu"),
        pytest.param("sm_90", 114, runtime.Target("sm_90", 114), id="another-gpu"),
    ],
)
def test_launchers_plan_for_the_role(role, multiprocessors, target):
    x = torch.empty(1, device="meta")
    with in_the_role_of(role, multiprocessors):
        assert runtime.target_for(x.device) == target
        assert runtime.is_planned(x)
    assert not runtime.is_planned(x)
