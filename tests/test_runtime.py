"""Where kernels run, what they allocate, and what they leave behind."""

import contextlib
import gc
import weakref
from math import prod

import pytest
import torch
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.interpreter import interpreter_builder

from kernels import conv2d, interpreter, runtime


def test_backends_by_device():
    assert runtime.backend_for("cpu") == "interpreter"
    assert runtime.backend_for(torch.device("cuda", 1)) == "compiled"
    with pytest.raises(RuntimeError, match="run on cuda and cpu tensors, not on mps"):
        runtime.backend_for("mps")


def test_each_buffer_of_a_launch_is_announced():
    seen = []
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    with runtime.on_allocate(lambda nbytes, what, tensor: seen.append((what, nbytes, tensor.numel() * 4))):
        y = conv2d(x, w)
        assert [what for what, _, _ in seen] == ["output", "input as channels-last", "weight as channels-last"]
        seen.clear()
        y.backward(torch.ones_like(y))
    assert {what for what, _, _ in seen} == {
        "input gradient", "weight gradient", "output gradient as channels-last", "weight as channels-last",
        "input as channels-last",
    }  # fmt: skip
    assert all(nbytes == size for _, nbytes, size in seen)
    count = len(seen)
    conv2d(x, w)
    assert len(seen) == count, "a closed context still listens"


def test_channels_last_operands_are_not_copied():
    seen = []
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(4, 16, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    with runtime.on_allocate(lambda nbytes, what, tensor: seen.append(what)):
        y = conv2d(x, w)
        y.backward(torch.ones_like(y))
    assert sorted(seen) == ["input gradient", "output", "weight gradient"]


def test_meta_tensors_get_shapes_and_strides_without_a_launch():
    x = torch.empty(2, 3, 9, 9, device="meta", requires_grad=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        w = torch.empty(4, 3, 3, 3, device="meta").to(memory_format=layout).requires_grad_()
        y = conv2d(x, w, stride=2)
        real_w = torch.zeros(4, 3, 3, 3).to(memory_format=layout)
        native = torch.nn.functional.conv2d(torch.zeros(2, 3, 9, 9), real_w, stride=2)
        assert (y.shape, y.stride()) == (native.shape, native.stride())
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
        assert (dx.shape, dw.shape) == (x.shape, w.shape)


@runtime.kernel
def _copy_some(x_ptr, y_ptr, COUNT, STEP: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    far = tl.where(place < COUNT, place * STEP, 1 << 30)  # masked addresses may be anything
    tl.store(y_ptr + far, tl.load(x_ptr + far, place < COUNT, other=7), place < COUNT)
    tl.store(y_ptr + place * STEP + 1, tl.load(x_ptr + far, place < COUNT, other=7))
    tl.store(y_ptr + far + 2, tl.load(x_ptr + far, place < COUNT), place < COUNT)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int32, torch.uint8], ids=str)
def test_our_loads_and_stores_are_the_interpreters(dtype, count):
    x = torch.arange(40).to(dtype)
    ours, theirs = torch.full((40,), 99).to(dtype), torch.full((40,), 99).to(dtype)
    runtime.launch(_copy_some, runtime.Target("interpreter", 1), (1, 1), x, ours, count, output=ours, STEP=3, BLOCK=8)
    _copy_some.interpreted[1, 1, 1](x, theirs, count, STEP=3, BLOCK=8)
    assert torch.equal(ours, theirs)
    assert (ours[1:25:3] == 7).sum() == 8 - count


@runtime.kernel
def _copy_blocks(
    x_ptr, y_ptr, ROWS, COLUMNS, stride_xm, stride_xn, stride_ym, stride_yn,
    HOLES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    inside = (o_m < ROWS)[:, None] & (o_n < COLUMNS)[None, :]
    if HOLES:
        inside &= (o_m[:, None] + o_n[None, :]) % 3 > 0
    p_x = x_ptr + (BLOCK_M - 1 - o_m)[:, None] * stride_xm + o_n[None, :] * stride_xn  # rows from the last up
    p_y = y_ptr + o_m[:, None] * stride_ym + o_n[None, :] * stride_yn
    b_x = tl.load(p_x, inside, other=5) + tl.load(p_x + 1, inside) + tl.load(p_x, (o_m < ROWS)[:, None], other=3)
    tl.store(p_y, b_x, inside)
    tl.store(p_y + BLOCK_M * BLOCK_N, tl.load(p_x))
    tl.store(p_y + 2 * BLOCK_M * BLOCK_N, tl.load(p_x, o_n[None, :] >= COLUMNS, other=2), (o_m < ROWS)[:, None])


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("strides", [(8, 1), (1, 4), (9, 2), (1, 1), (0, 1), (8, 0)], ids=str)
@pytest.mark.parametrize("rows", [0, 3, 4])
@pytest.mark.parametrize("columns", [0, 5, 8])
def test_blocks_of_rows_are_the_interpreters(rows, columns, strides, holes):
    """Rows and columns that lie side by side in memory are copied as a whole, however the mask cuts them."""
    x = torch.arange(80.0)
    ours, theirs = torch.full((96,), 99.0), torch.full((96,), 99.0)
    sizes = rows, columns, *strides, 8, 1
    constants = dict(HOLES=holes, BLOCK_M=4, BLOCK_N=8)
    runtime.launch(_copy_blocks, runtime.Target("interpreter", 1), (1, 1), x, ours, *sizes, output=ours, **constants)
    _copy_blocks.interpreted[1, 1, 1](x, theirs, *sizes, **constants)
    assert torch.equal(ours, theirs)


def test_global_state_of_triton_is_put_back_after_a_failure():
    builder, active = dict(vars(interpreter_builder)), driver._active
    with pytest.raises(RuntimeError, match="made to fail"), runtime.compiling_ahead("sm_80"):
        raise RuntimeError("made to fail")
    assert driver._active is active

    @runtime.kernel
    def broken(x_ptr):
        undefined_name()  # noqa: F821

    with pytest.raises(Exception, match="undefined_name"):
        runtime.launch(broken, runtime.Target("interpreter", 1), (1, 1), x := torch.zeros(1), output=x)
    assert vars(interpreter_builder) == builder
    torch.testing.assert_close(conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)), torch.full((1, 1, 1, 1), 4.0))


INTERPRETER, H100 = runtime.Target("interpreter", 1), runtime.Target("sm_90", 132)
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)


def announced(
    device, layout, target=None, *, x=(2, 8, 9, 9), w=(6, 8, 3, 3), bias=True, dtype=torch.float32, **geometry
):
    """(what, shape, strides, bytes) of each buffer of a forward and a backward pass, in order."""
    seen = []
    x, w = (torch.zeros(s, dtype=dtype, device=device).to(memory_format=layout).requires_grad_() for s in (x, w))
    b = torch.zeros(w.size(0), dtype=dtype, device=device, requires_grad=True) if bias else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            runtime.on_allocate(lambda nbytes, what, t: seen.append((what, tuple(t.shape), t.stride(), nbytes)))
        )
        if target is not None:
            stack.enter_context(runtime.planning(target))
        y = conv2d(x, w, b, **geometry)
        y.backward(torch.zeros_like(y))
    return seen


@LAYOUTS
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="bias"),
        pytest.param({"bias": False}, id="no-bias"),
        pytest.param({"stride": 2, "padding": 1}, id="stride-2"),
        pytest.param({"groups": 2, "w": (6, 4, 3, 3)}, id="groups"),
        pytest.param({"groups": 8, "w": (16, 1, 3, 3)}, id="depthwise"),
        pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
        pytest.param({"x": (0, 8, 9, 9)}, id="empty-batch"),
    ],
)
def test_a_planned_launch_takes_the_buffers_of_a_real_one_in_its_order(layout, options):
    real = announced("cpu", layout, **options)
    assert {"output", "input gradient", "weight gradient"} <= {what for what, *_ in real}
    assert announced("meta", layout, INTERPRETER, **options) == real
    assert announced("meta", layout, **options) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"w": (64, 64, 3, 3)}, id="dense"),
        pytest.param({"w": (64, 32, 3, 3), "groups": 2}, id="groups"),
        pytest.param({"w": (64, 1, 3, 3), "groups": 64}, id="depthwise"),
    ],
)
def test_a_launch_planned_for_a_gpu_takes_its_split_k_workspaces(options, dtype):
    seen = announced("meta", torch.channels_last, H100, x=(64, 64, 16, 16), dtype=dtype, **options)
    of_weight, of_bias = [buffer for buffer in seen if buffer[0] == "split-K workspace"]
    co, ci, r, s = options["w"]
    for (_, shape, _, nbytes), summed in ((of_weight, (co, r, s, ci)), (of_bias, (co, 1, 1, 1))):
        splits, *rest = shape
        assert tuple(rest) == summed
        assert splits > 1
        assert nbytes == prod(shape) * (8 if dtype == torch.float64 else 4)


def test_only_meta_tensors_under_planning_are_planned():
    meta, real = torch.empty(1, 1, 2, 2, device="meta"), torch.ones(1, 1, 2, 2)
    assert not runtime.is_planned(meta)
    with runtime.compiling_ahead("sm_80"):
        assert not runtime.is_planned(meta)
    with pytest.raises(RuntimeError, match="not on meta"):
        runtime.target_for(meta.device)
    with runtime.planning(H100):
        assert runtime.is_planned(meta)
        assert not runtime.is_planned(real)
        assert runtime.target_for(meta.device) == H100
        assert conv2d(real, real).item() == 4, "real tensors are computed with all the same"
    with pytest.raises(RuntimeError, match="made to fail"), runtime.planning(H100):
        raise RuntimeError("made to fail")
    assert not runtime.is_planned(meta)
    with pytest.raises(RuntimeError, match="not on meta"):
        runtime.target_for(meta.device)


def test_compilation_ahead_and_planning_do_not_meet():
    def compiled():
        return runtime.compile_ahead("forward", (1, 32, 6, 6), (3, 32, 3, 3))

    shape = (2, 8, 9, 9)
    before = announced("meta", torch.channels_last, H100)
    kernels = compiled()
    assert [kernel.metadata.name for kernel in kernels] == ["forward_kernel"]
    assert announced("meta", torch.channels_last, H100) == before
    assert len(kernels) == 1, "a planned launch was compiled"
    with runtime.planning(H100):
        assert len(compiled()) == 1
    assert len(compiled()) == 1
    assert conv2d(torch.empty(shape, device="meta"), torch.empty(6, 8, 3, 3, device="meta")).shape == (2, 6, 7, 7)


@pytest.mark.parametrize(
    "inner", [lambda: runtime.planning(INTERPRETER), lambda: runtime.compiling_ahead("sm_80")],
    ids=["planning", "compiling-ahead"],
)  # fmt: skip
def test_planning_goes_on_after_an_inner_context(inner):
    meta = torch.empty(1, device="meta")
    with runtime.planning(H100):
        with inner():
            pass
        assert runtime.is_planned(meta)
        assert runtime.target_for(meta.device) == H100


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depthwise"])
def test_an_interpreted_launch_keeps_no_memory(layout, dtype, groups):
    """As a launch on a GPU: what nobody refers to is free, without waiting for Python to look for cycles."""
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(2, 4, 8, 8).to(dtype=dtype, memory_format=layout).requires_grad_()
        w = torch.randn(4, 4 // groups, 3, 3).to(dtype=dtype, memory_format=layout).requires_grad_()
        b = torch.randn(4, dtype=dtype, requires_grad=True)
        stored = []
        with runtime.on_allocate(lambda nbytes, what, t: stored.append(weakref.ref(t.untyped_storage()))):
            y = conv2d(x, w, b, groups=groups)
            y.backward(torch.ones_like(y))
        stored += [weakref.ref(t.untyped_storage()) for t in (x, w, b, b.grad)]
        assert sum(storage() is not None for storage in stored) >= 7
        del x, w, b, y
        assert not [storage for storage in stored if storage() is not None]
    finally:
        gc.enable()


def test_an_interpreted_kernel_has_room_on_the_stack():
    """More than two of CPython's blocks of 16 KiB, so that its frames get a block of their own, of 64."""
    assert 8 * interpreter._with_room.__code__.co_nlocals > 2 * 16 * 1024
    assert interpreter._with_room(lambda: 3) == 3
