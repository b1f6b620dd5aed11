"""The accountant and what operators take: convolutions, sums, gradients that are added up, and no value is changed."""


import pytest
import torch
from storages import KIB, W, X, kib, net
from torch import Tensor, nn
from torch.nn import functional as F

import models
from bench.measure.account import OUTSIDE, Change, ConvolutionCall, ReductionCall, ScratchCall
from bench.measure.tracker import Tracker


@pytest.fixture(params=["cpu", "meta"])
def device(request):
    return request.param


FORWARD_CALL = ("aten.convolution", 1536 + 432 + 2048)
INPUT_GRAD_CALL, WEIGHT_GRAD_CALL = (("aten.convolution_backward", 2048 + 432 + 1536),) * 2


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "trained", "calls"),
    [
        pytest.param(X, W, "xwb", [FORWARD_CALL, INPUT_GRAD_CALL, WEIGHT_GRAD_CALL], id="each-gradient-is-one"),
        pytest.param(X, W, "wb", [FORWARD_CALL, WEIGHT_GRAD_CALL], id="none-for-a-frozen-input"),
        pytest.param(
            (2, 4, 8, 8), (4, 4, 3, 3), "xw",
            [("aten.convolution", 2048 + 576 + 2048)] + [("aten.convolution_backward", 2048 + 576 + 2048)] * 2,
            id="input-and-output-of-one-shape",
        ),
    ],
)  # fmt: skip
def test_library_convolutions_are_entered_with_their_operands_and_result(device, x_shape, w_shape, trained, calls):
    model = net(nn.Conv2d(w_shape[1], w_shape[0], 3, padding=1), device)
    model.block.weight.requires_grad_("w" in trained)
    tracker = Tracker(device)
    tracker.watch(model)
    with tracker:
        model(torch.zeros(x_shape, device=device, requires_grad="x" in trained)).sum().backward()
    entered = [entry for entry in tracker.account.entries if isinstance(entry, ConvolutionCall)]
    assert [(call.operator, call.nbytes) for call in entered] == calls
    assert {call.module for call in entered} == {"block"}


@pytest.mark.parametrize("conv", ["unfold", "triton"])
def test_our_convolutions_are_no_librarys(conv):
    model = net(models.CONVOLUTIONS[conv](3, 4, 3), "meta")
    with Tracker("meta") as tracker:
        model(torch.zeros(X, device="meta")).sum().backward()
    assert not [entry for entry in tracker.account.entries if isinstance(entry, ConvolutionCall)]


def laid(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype = torch.float32):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device).to(memory_format=layout)


LAST, DENSE = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("make", "dims", "call"),
    [
        pytest.param(laid((2, 6, 4, 5), LAST), (0, 2, 3), (6, 40, 4), id="bias-gradient-channels-last"),
        pytest.param(laid((2, 6, 4, 5), LAST), (0, -2, -1), (6, 40, 4), id="counted-from-the-end"),
        pytest.param(laid((2, 6, 4, 5), DENSE), (0, 2, 3), None, id="bias-gradient-contiguous"),
        pytest.param(laid((7, 6), DENSE), (0,), (6, 7, 4), id="bias-gradient-of-a-linear-layer"),
        pytest.param(laid((7, 6), DENSE), (-1,), None, id="along-rows"),
        pytest.param(laid((7, 2, 3, 4), DENSE), (0,), (24, 7, 4), id="several-dimensions-kept"),
        pytest.param(laid((7, 2, 3), DENSE), (1,), None, id="a-dimension-between"),
        pytest.param(laid((2, 6, 1, 5), LAST), (0, 3), (6, 10, 4), id="one-of-size-1-is-no-matter"),
        pytest.param(laid((7, 6), DENSE), (0, 1), None, id="nothing-kept"),
        pytest.param(laid((7, 6), DENSE), (), None, id="everything"),
        pytest.param(laid((7, 6), DENSE, torch.bfloat16), (0,), (6, 7, 4), id="half-precision-adds-in-float32"),
        pytest.param(laid((7, 6), DENSE, torch.float64), (0,), (6, 7, 8), id="float64"),
    ],
)
def test_sums_whose_results_lie_side_by_side_are_entered(device, make, dims, call):
    with Tracker(device) as tracker:
        make(device).sum(dims)
    entered = [entry for entry in tracker.account.entries if isinstance(entry, ReductionCall)]
    assert entered == ([] if call is None else [ReductionCall("aten.sum", OUTSIDE, *call)])


def test_a_sum_is_the_modules_whose_backward_pass_it_is_in(device):
    model = net(nn.Linear(6, 8), device)
    tracker = Tracker(device)
    tracker.watch(model)
    with tracker:
        y = model(torch.zeros(7, 6, device=device))
        y.backward(torch.ones_like(y))
    entered = [entry for entry in tracker.account.entries if isinstance(entry, ReductionCall)]
    assert entered == [ReductionCall("aten.sum", "block", 8, 7, 4)]


def skip_gradient(device: str, keeps: bool, when_added, create_graph: bool = False) -> None:
    """The backward pass of h = x * 1, y = exp(h) + branch(h), all of 8 KiB; `branch` comes first and may keep its own.

    Calls when_added(gradient of h, address of branch's) while nothing else but x, exp(h), y and the gradient of y live.
    """
    kept, address = [], []

    class Branch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            result = gradient * 3
            address.append(result.data_ptr())
            kept.extend([result] * keeps)
            return result

    x = kib(8, device).requires_grad_()
    h = x * 1
    h.register_hook(lambda gradient: when_added(gradient, address[0]))
    y = h.exp() + Branch.apply(h)
    del h
    y.backward(torch.ones_like(y), retain_graph=True, create_graph=create_graph)  # exp(h) stays
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    ("keeps", "create_graph"),
    [
        pytest.param(False, False, id="nobody-keeps-the-earlier"),
        pytest.param(True, False, id="somebody-keeps-the-earlier"),
        pytest.param(False, True, id="the-sum-is-differentiated-again"),
    ],
)
def test_gradients_are_added_in_place_where_autograd_adds_them_so(device, keeps, create_graph):
    in_place, live, tracker = [], [], Tracker(device)

    def compare(gradient: Tensor, address: int) -> None:
        in_place.append(gradient.data_ptr() == address)

    def when_added(*_: object) -> None:
        tracker.mark("until it is added")
        live.append(tracker.now)

    skip_gradient("cpu", keeps, compare, create_graph)
    assert in_place == [not keeps and not create_graph], "what PyTorch does when nobody looks on"
    with tracker:
        skip_gradient(device, keeps, when_added, create_graph)
    assert live == [(5 + keeps) * 8 * KIB]
    changes = [entry for entry in tracker.account.entries if isinstance(entry, Change) and entry.nbytes]
    added = [change.storage for change in changes if change.operator == "aten.add"]
    multiplied = {change.storage for change in changes if change.operator == "aten.mul"}
    assert (added[-1] in multiplied) is in_place[0], "it has the storage of the branch's gradient, which a product made"


def test_a_sum_outside_of_autograd_takes_its_own(device):
    with Tracker(device) as tracker, torch.no_grad():
        a, b = kib(8, device), kib(8, device)
        a = a + b
    assert tracker.peak == 3 * 8 * KIB


@pytest.mark.parametrize(
    ("narrow", "nbytes"),
    [
        pytest.param(lambda gradient: gradient.sum(0, keepdim=True), 256, id="of-another-shape"),
        pytest.param(lambda gradient: gradient.half(), 4 * KIB, id="of-another-type"),
    ],
)
def test_what_has_no_room_for_a_sum_is_no_place_for_it(device, narrow, nbytes):
    class Widens(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return narrow(gradient) + gradient

    with Tracker(device) as tracker:
        x = torch.zeros(32, 64, device=device, requires_grad=True)
        y = Widens.apply(x)
        y.backward(torch.ones_like(y))
    assert tracker.peak == 4 * 8 * KIB + nbytes


def test_a_gradient_added_in_place_takes_nothing(device):
    tracker = Tracker(device)
    with tracker:
        skip_gradient(device, False, lambda *_: tracker.mark("until it is added"))
    assert tracker.account.phases["until it is added"].peak.nbytes == 6 * 8 * KIB


def test_a_gradient_added_beside_a_kept_one_is_live_in_the_next_operator(device):
    def work_on(*_: object) -> None:
        kib(100, device)

    with Tracker(device) as tracker:
        skip_gradient(device, True, work_on)
    assert tracker.peak == (6 * 8 + 100) * KIB


def test_a_gradient_that_is_dropped_as_soon_as_it_is_added_is_gone(device):
    kept = []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            kept.append(gradient * 3)
            return kept[0]

    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> None:
            return None

    x = kib(8, device).requires_grad_()
    with Tracker(device) as tracker:
        h = Ends.apply(x)
        y = h.exp() + Keeps.apply(h)
        del h
        y.backward(torch.ones_like(y))
        del y
        tracker.mark("end")
    assert tracker.now == x.nbytes + kept[0].nbytes


def test_a_gradient_is_added_up_in_the_module_where_the_paths_meet(device):
    class Skip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 1
            return h.exp() + h.sin()

    model = net(Skip(), device)
    tracker = Tracker(device)
    tracker.watch(model)
    with tracker:
        y = model(torch.zeros(4, device=device, requires_grad=True))
        y.backward(torch.ones_like(y))
    added = [e for e in tracker.account.entries if isinstance(e, Change) and e.operator == "aten.add" and e.nbytes]
    assert [entry.module for entry in added] == ["block", "block"]


def test_a_gradient_added_beside_a_kept_one_is_live_with_both_its_terms(device):
    tracker = Tracker(device)
    with tracker:
        skip_gradient(device, True, lambda *_: tracker.mark("until it is added"))
    assert tracker.account.phases["until it is added"].peak.nbytes == 7 * 8 * KIB


def train(name: str, conv: str, tracker: Tracker | None) -> list[Tensor]:
    """Parameters and buffers after two steps."""
    torch.manual_seed(0)
    size = 32 if name == "resnet18" else 8
    model = models.build(name, conv, 10, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(4, 3, size, size), torch.arange(4)
    if tracker is not None:
        tracker.watch(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize(
    ("name", "conv"),
    [
        ("simplenet", "torch"), ("simplenet", "unfold"), ("simplenet", "triton"), ("customnet", "torch"),
        ("customnet", "triton"), ("simplevit", "torch"), ("resnet18", "torch"),
    ],
)  # fmt: skip
def test_tracking_changes_no_value(name, conv):
    expected = train(name, conv, None)
    tracker = Tracker("cpu")
    with tracker:
        actual = train(name, conv, tracker)
    assert all(map(torch.equal, actual, expected))
    assert all(value.isfinite().all() for value in expected)


def test_unfold_first_takes_a_tensor_like_its_argument(device):
    """Which a GPU's kernel then makes larger; where the result is smaller, it keeps the larger storage."""
    x = torch.zeros(1, 2, 8, 8, device=device)  # 512 bytes
    with Tracker(device) as tracker:
        large = F.unfold(x, 3, padding=1)
        small = F.unfold(x, 1, stride=2)
        entries = [entry for entry in tracker.account.entries if entry.operator == "aten.im2col"]
        assert entries[0] == ScratchCall("aten.im2col", OUTSIDE, 512)
        assert [entry.nbytes for entry in entries[1:]] == [large.nbytes, 512]
    del small
