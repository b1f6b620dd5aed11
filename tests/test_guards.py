"""Every guard catches a kernel, or a launch, that is deliberately wrong."""

from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from guards import MAY_POINT_ANYWHERE, guarded
from reference import random
from triton.runtime.errors import InterpreterError

from kernels import conv2d, runtime
from kernels.max_pool2d import max_pool2d

pytestmark = pytest.mark.on_device

COUNT = 5
FLOATS = pytest.mark.parametrize("dtype", runtime.DTYPES, ids=str)
SOME = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # as it is, or on a copy


@runtime.kernel
def _copy(
    x_ptr, y_ptr,
    FIRST_READ, END_READ, FIRST_WRITTEN, END_WRITTEN,
    COUNT: tl.constexpr, POINT_INSIDE: tl.constexpr, USE_ALL: tl.constexpr,
):  # fmt: skip
    # Reads elements FIRST_READ to END_READ of COUNT, writes FIRST_WRITTEN to END_WRITTEN.
    o = tl.arange(0, 8) - 1
    read = (o >= FIRST_READ) & (o < END_READ)
    o_x = tl.where(read, o, 0) if POINT_INSIDE else o
    b_x = tl.load(x_ptr + o_x, read, other=0.0)
    if not USE_ALL:
        b_x = tl.where((o >= 0) & (o < COUNT), b_x, 0.0)
    tl.store(y_ptr + o, b_x, (o >= FIRST_WRITTEN) & (o < END_WRITTEN))


def copied(x, *ranges, point_inside=True, use_all=True) -> torch.Tensor:
    y = runtime.empty((COUNT,), "copy", dtype=x.dtype, device=x.device)
    runtime.launch(
        _copy, runtime.target_for(x.device), (1, 1), x, y, *ranges,
        COUNT=COUNT, POINT_INSIDE=point_inside, USE_ALL=use_all, num_warps=1, num_stages=1, output=y,
    )  # fmt: skip
    return y


def operand(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(COUNT, dtype=dtype, seed=1)


@FLOATS
def test_a_right_kernel_passes(dtype):
    x = operand(dtype)
    with guarded() as guards:
        y = copied(guards.place(x, 3), 0, COUNT, 0, COUNT)
    assert torch.equal(x, y)


@FLOATS
@pytest.mark.parametrize(
    "ranges", [(0, COUNT, -1, COUNT), (0, COUNT, 0, COUNT + 1)], ids=["before-the-first", "past-the-last"]
)
def test_a_store_outside_is_caught(dtype, ranges):
    with pytest.raises((InterpreterError, AssertionError), match=r"writes outside|copy: written"), guarded() as g:
        copied(g.place(operand(dtype)), *ranges)


@FLOATS
@pytest.mark.parametrize("ranges", [(0, COUNT, 1, COUNT), (0, COUNT, 0, COUNT - 1)], ids=["first", "last"])
def test_an_element_never_written_is_caught(dtype, ranges):
    with pytest.raises(AssertionError, match="1 elements were never written"), guarded() as guards:
        copied(guards.place(operand(dtype)), *ranges)


@SOME
@pytest.mark.cpu_only("the addresses are the interpreter's")
@pytest.mark.parametrize("ranges", [(-1, COUNT, 0, COUNT), (0, COUNT + 1, 0, COUNT)], ids=["before", "past-the-end"])
def test_a_read_outside_is_caught_even_if_it_is_thrown_away(dtype, ranges):
    with pytest.raises(InterpreterError, match="_copy reads outside"), guarded() as guards:
        copied(guards.place(operand(dtype)), *ranges, use_all=False)


@SOME
@pytest.mark.cpu_only("the addresses are the interpreter's")
def test_a_masked_read_that_points_outside_is_caught(dtype):
    with pytest.raises(InterpreterError, match="_copy masks an address outside"), guarded() as guards:
        copied(guards.place(operand(dtype)), 0, COUNT, 0, COUNT, point_inside=False)


@pytest.mark.cpu_only("the addresses are the interpreter's")
def test_a_kernel_that_is_not_pipelined_may_mask_what_it_reads_anywhere(monkeypatch):
    monkeypatch.setattr("guards.MAY_POINT_ANYWHERE", {"_copy"})
    with guarded() as guards:
        copied(guards.place(operand()), 0, COUNT, 0, COUNT, point_inside=False)
    with pytest.raises(InterpreterError, match="_copy reads outside"), guarded() as guards:
        copied(guards.place(operand()), 0, COUNT + 1, 0, COUNT, point_inside=False)


@pytest.mark.cpu_only("compiles for a GPU that is not here")
def test_what_may_mask_addresses_anywhere_makes_no_asynchronous_copies():
    compiled = [
        kernel
        for op in ("forward", "bias_grad", "bias_grad_masked")
        for kernel in runtime.compile_ahead(op, (8, 64, 32, 32), (64, 64, 3, 3), padding=1, arch="sm_80")
    ]
    copying = {kernel.metadata.name for kernel in compiled if "cp.async" in kernel.asm["ptx"]}
    assert "forward_kernel" in copying
    assert {kernel.metadata.name for kernel in compiled} - copying >= MAY_POINT_ANYWHERE


# What follows needs no address, as on a GPU: wrong accesses that PyTorch makes in a kernel's place.


@SOME
@pytest.mark.parametrize("place", [-1, COUNT])
def test_what_is_written_outside_an_output_is_caught(dtype, place):
    with guarded() as guards:
        y = copied(guards.place(operand(dtype)), 0, COUNT, 0, COUNT)
    y.as_strided((1,), (1,), y.storage_offset() + place).fill_(1)
    with pytest.raises(AssertionError, match="copy: written"):
        guards.check()


@SOME
@pytest.mark.parametrize("place", [-1, 0, 1, 2 * COUNT - 1], ids=["before", "in-it", "in-a-gap", "past-it"])
def test_what_is_written_around_an_operand_is_caught(dtype, place):
    with guarded() as guards:
        x = guards.place(random(2 * COUNT, dtype=dtype, seed=1)[::2], 1)
    x.as_strided((1,), (1,), x.storage_offset() + place).fill_(1)
    with pytest.raises(AssertionError, match="an operand, or what lies around it"):
        guards.check()


@FLOATS
def test_around_an_operand_and_in_its_gaps_is_nan(dtype):
    x = random(3, 2 * COUNT, dtype=dtype, seed=1)[:, ::2].t()
    with guarded() as guards:
        placed = guards.place(x, 3)
    assert torch.equal(placed, x)
    assert placed.stride() == x.stride()
    assert placed.storage_offset() % 2 == 1
    memory = placed.as_strided((placed.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    assert memory.isnan().sum() == memory.numel() - x.numel()
    assert memory[: placed.storage_offset()].isnan().all()
    assert placed.storage_offset() >= 64


def test_an_expanded_operand_keeps_its_strides():
    x = operand().expand(3, COUNT)
    with guarded() as guards:
        placed = guards.place(x)
    assert torch.equal(placed, x)
    assert placed.stride() == (0, 1)


# Launches of the lab's own kernels with one number wrong.


def wrong(monkeypatch: pytest.MonkeyPatch, name: str, place: int, by: int) -> None:
    """Adds `by` to one of the whole numbers that this kernel is launched with."""
    launch = runtime.launch

    def launch_wrong(kernel, target, grid, *args, **options):
        args = list(args)
        if kernel.name == name:
            numbers = [i for i, arg in enumerate(args) if isinstance(arg, int)]
            args[numbers[place]] += by
        launch(kernel, target, grid, *args, **options)

    monkeypatch.setattr(runtime, "launch", launch_wrong)


CALLS = {
    "convolution": lambda x, w, thin, b: conv2d(x, w, b),
    "depthwise": lambda x, w, thin, b: conv2d(x, thin, b, groups=4),
    "pooling": lambda x, w, thin, b: max_pool2d(x, 2),
}


def trained(call: Callable) -> None:
    """Calls it on a guarded image (1, 4, 6, 5), filters, filters of one channel and bias, and goes backward."""
    shapes = (1, 4, 6, 5), (4, 4, 2, 2), (4, 1, 2, 2)
    tensors = [random(*shape, dtype=torch.float32, seed=1).to(memory_format=torch.channels_last) for shape in shapes]
    with guarded() as guards:
        operands = [guards.place(t).requires_grad_() for t in (*tensors, random(4, dtype=torch.float32, seed=2))]
        y = call(*operands)
        y.backward(guards.place(random(*y.shape, dtype=torch.float32, seed=3)))


@pytest.mark.parametrize("call", CALLS)
def test_right_launches_pass(call):
    trained(CALLS[call])


@pytest.mark.parametrize(
    ("call", "kernel", "number", "by"),
    [
        pytest.param("convolution", "forward_kernel", 0, 1, id="forward-a-pixel-more"),
        pytest.param("convolution", "forward_kernel", 0, -1, id="forward-a-pixel-less"),
        pytest.param("convolution", "input_grad_kernel", 3, 1, id="input-grad-a-row-more"),
        pytest.param("convolution", "input_grad_kernel", 3, -1, id="input-grad-a-row-less"),
        pytest.param("convolution", "bias_grad_kernel", 2, -1, id="bias-grad-a-channel-less"),
        pytest.param("depthwise", "depthwise_forward_kernel", 0, 1, id="depthwise-forward-a-pixel-more"),
        pytest.param("depthwise", "depthwise_forward_kernel", 0, -1, id="depthwise-forward-a-pixel-less"),
        pytest.param("depthwise", "depthwise_input_grad_kernel", 0, -1, id="depthwise-input-grad-a-pixel-less"),
        pytest.param("pooling", "max_pool_kernel", 0, 1, id="pooling-a-pixel-more"),
        pytest.param("pooling", "max_pool_kernel", 0, -1, id="pooling-a-pixel-less"),
        pytest.param("pooling", "max_pool_grad_kernel", 1, 1, id="pooling-grad-a-row-more"),
    ],
)
def test_a_launch_that_stores_too_much_or_too_little_is_caught(call, kernel, number, by, monkeypatch):
    wrong(monkeypatch, kernel, number, by)
    caught = r"(reads|writes) outside|written past its last" if by > 0 else "elements were never written"
    with pytest.raises((InterpreterError, AssertionError), match=caught):
        trained(CALLS[call])


@pytest.mark.cpu_only("the addresses are the interpreter's")
@pytest.mark.parametrize(
    ("call", "kernel", "number", "by"),
    [
        pytest.param("convolution", "forward_kernel", 4, -1, id="forward-with-fewer-rows-out"),
        pytest.param("convolution", "input_grad_kernel", 5, 1, id="input-grad-with-more-rows-out"),
        pytest.param("convolution", "weight_grad_kernel", 5, -1, id="weight-grad-with-fewer-rows-out"),
        pytest.param("convolution", "bias_grad_kernel", 0, 1, id="bias-grad-a-pixel-more"),
        pytest.param("depthwise", "depthwise_forward_kernel", 2, 1, id="depthwise-forward-with-wider-rows"),
        pytest.param("depthwise", "depthwise_input_grad_kernel", 4, 1, id="depthwise-input-grad-with-wider-rows-out"),
        pytest.param("depthwise", "depthwise_weight_grad_kernel", 4, -1, id="depthwise-weight-grad-fewer-rows-out"),
        pytest.param("pooling", "max_pool_kernel", 3, -1, id="pooling-with-fewer-rows-out"),
        pytest.param("pooling", "max_pool_grad_kernel", 4, 1, id="pooling-grad-with-wider-rows-out"),
    ],
)
def test_a_launch_that_reads_outside_is_caught(call, kernel, number, by, monkeypatch):
    wrong(monkeypatch, kernel, number, by)
    with pytest.raises(InterpreterError, match=f"{kernel} reads outside"):
        trained(CALLS[call])
