"""Where kernels run, what they allocate, and what they leave behind."""

import pytest
import torch
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.interpreter import interpreter_builder

from kernels import conv2d, runtime


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
