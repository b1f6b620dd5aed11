"""Tensors of more than 2**31 elements: offsets are computed in 64 bits.

The tensors are allocated and hardly touched: memory that nobody writes or reads costs addresses only. Some convolutions
read few pixels of theirs; of the others only the last program of the grid is run, whose offsets are the largest.
"""

import pytest
import torch
import triton.language as tl
from reference import native_conv2d, random
from torch.nn.functional import conv_transpose2d
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels import conv2d, interpreter, runtime, split_k, tiles
from kernels.forward import forward
from kernels.geometry import ConvGeometry
from kernels.input_grad import input_grad
from kernels.runtime import compile_ahead
from kernels.weight_grad import weight_grad

LAST = torch.channels_last


def untouched(*shape: int) -> torch.Tensor:
    """A channels-last float16 tensor whose memory nobody has touched."""
    try:
        tensor = torch.empty(shape, dtype=torch.float16, memory_format=LAST)
    except RuntimeError as error:
        pytest.skip(f"no address space for a tensor of {shape}: {error}")
    assert tensor.numel() > 2**30
    return tensor


def half(*shape: int, seed: int) -> torch.Tensor:
    return random(*shape, dtype=torch.float16, seed=seed).to(memory_format=LAST)


def assert_near(actual: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), exact.double(), rtol=2e-3, atol=2e-3)
    assert exact.abs().max() > 0.1, "zeros would agree with memory that was never written"


# (x, w, stride and dilation, groups): pixels past 2**31; elements alone; for depthwise; and fewer pixels, but more than
# that with the filter's steps added to them.
SPARSE = [
    pytest.param((2, 1, 2**15, 2**15 + 64), (3, 1, 2, 2), (2**13, 2**13), 1, id="pixels-few-channels"),
    pytest.param((1, 4, 2**15, 2**15 + 64), (3, 4, 2, 2), (2**14, 2**14), 1, id="elements-within-a-filter"),
    pytest.param((1, 32, 2**13, 2**13 + 64), (5, 32, 2, 2), (2**11, 2**11), 1, id="elements-many-channels"),
    pytest.param((1, 32, 2**13, 2**13 + 64), (64, 1, 2, 2), (2**11, 2**11), 32, id="depthwise"),
    pytest.param((1, 1, 3 * 2**29, 1), (1, 1, 2, 1), (3 * 2**29 - 1, 1), 1, id="a-column"),
    pytest.param((1, 1, 1, 3 * 2**29), (1, 1, 1, 2), (1, 3 * 2**29 - 1), 1, id="a-row"),
    pytest.param((1, 1, 2**30 + 2, 1), (1, 1, 3, 1), (2**29, 1), 1, id="a-column-of-three-taps"),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "step", "groups"), SPARSE)
def test_few_pixels_of_a_large_image_are_found(x_shape, w_shape, step, groups):
    x = untouched(*x_shape)
    seen = half(*x[:, :, :: step[0], :: step[1]].shape, seed=1)
    x[:, :, :: step[0], :: step[1]] = seen
    w, exact_w = (half(*w_shape, seed=2).to(dtype).requires_grad_() for dtype in (torch.float16, torch.float64))
    y = conv2d(x, w, stride=step, dilation=step, groups=groups)
    exact = native_conv2d(seen.double(), exact_w, groups=groups)[:, :, : y.shape[2], : y.shape[3]]
    assert_near(y, exact)
    dy = half(*y.shape, seed=3)
    y.backward(dy)
    exact.backward(dy.double())
    assert_near(w.grad, exact_w.grad)


@pytest.mark.parametrize("groups", [1, 32])
def test_the_middle_of_a_large_output_gradient_is_found(groups):
    # A small image in a wide halo: its gradient reads the middle of dy.
    halo = 2**13 // 2
    dy = untouched(1, 32, 2 * halo + 2, 2 * halo + 65)
    w = half(32, 32 // groups, 3, 3, seed=1)
    x_shape = (1, 32, 4, 67)
    middle = dy[:, :, halo - 2 : halo + 4, halo - 2 : halo + 67]
    middle.copy_(half(*middle.shape, seed=2))
    dx = torch.ops.conv_lab.input_grad(dy, w, x_shape, (1, 1), (halo, halo), (1, 1), groups, True)
    exact = conv_transpose2d(middle.double(), w.double(), padding=2, groups=groups)
    assert_near(dx, exact)


@pytest.fixture
def last_program(monkeypatch):
    """Launches run the last program of their grid alone; second passes of split-K are left out."""
    program = []
    interpret = interpreter.interpret

    def run(kernel, grid, args, output, constants):
        if kernel is not split_k.sum_splits_kernel.interpreted:
            program[:] = grid[0] - 1, grid[1] - 1
            interpret(kernel, (1, 1), args, output, constants)

    def create_get_program_id(self, axis):
        return TensorHandle(torch.tensor([program[axis]], dtype=torch.int32).numpy(), tl.int32)

    monkeypatch.setattr(interpreter, "interpret", run)
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", create_get_program_id)


# (image, groups): past 2**31 elements or, with few channels, pixels; by the number of rows, of columns, of images.
LARGE = [
    pytest.param((1, 1, 2**25 + 256, 64), 1, id="rows-of-pixels"),
    pytest.param((2, 1, 2**25 + 256, 64), 1, id="two-images"),
    pytest.param((2**20 + 128, 32, 8, 8), 1, id="images"),
    pytest.param((1, 32, 2**20 + 2**16, 64), 1, id="rows"),
    pytest.param((1, 32, 1, 2**26 + 8192), 1, id="columns"),
    pytest.param((2, 2, 2**24 + 256, 64), 2, id="depthwise-two-images"),
    pytest.param((2**20 + 128, 32, 8, 8), 32, id="depthwise-images"),
    pytest.param((1, 32, 2**20 + 2**16, 64), 32, id="depthwise-rows"),
    pytest.param((1, 32, 1, 2**26 + 8192), 32, id="depthwise-columns"),
    pytest.param((1, 2, 2**25 + 256, 64), 2, id="depthwise-rows-of-pixels"),
]


def end(tensor: torch.Tensor, pixels: int) -> torch.Tensor:
    """The last so many pixels: images, or the last one's rows, or columns of its only row."""
    rows, columns = tensor.shape[2:]
    if rows * columns <= pixels:
        return tensor[-pixels // (rows * columns) :]
    axis, lines = (3, pixels) if rows == 1 else (2, pixels // columns)
    return tensor[-1:].narrow(axis, tensor.shape[axis] - lines, lines)


BLOCK = tiles.INTERPRETER_ROWS
"""Pixels that the last program computes."""
RANDOM = BLOCK + 512
"""Pixels at the end of the image that are not as they were allocated: a block's and its neighbours."""


def large(x_shape: tuple, groups: int) -> tuple[ConvGeometry, torch.Tensor, torch.Tensor]:
    """A 3x3 convolution to an output of the same shape: its geometry, an image with a random end, and the filter."""
    geometry = ConvGeometry.of(x_shape, (x_shape[1], x_shape[1] // groups, 3, 3), 1, 1, 1, groups)
    x = untouched(*x_shape)
    end(x, RANDOM).copy_(half(*end(x, RANDOM).shape, seed=1))
    return geometry, x, half(*geometry.w_shape, seed=2)


LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("x_shape", "groups"), LARGE)
def test_the_end_of_a_large_output_is_right(x_shape, groups, layout, last_program):
    geometry, x, w = large(x_shape, groups)
    exact = native_conv2d(end(x, RANDOM).double(), w.double(), padding=1, groups=groups)
    assert_near(end(forward(x, w, None, geometry, memory_format=layout), BLOCK), end(exact, BLOCK))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("x_shape", "groups"), LARGE)
def test_the_end_of_a_large_input_gradient_is_right(x_shape, groups, layout, last_program):
    geometry, dy, w = large(x_shape, groups)
    exact = conv_transpose2d(end(dy, RANDOM).double(), w.double(), padding=1, groups=groups)
    assert_near(end(input_grad(dy, w, geometry, memory_format=layout), BLOCK), end(exact, BLOCK))


# In an image of one row the last tap lies in the halo. Interpreted tiles are flat, a GPU's are where channels are few.
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("x_shape", "groups"), [case for case in LARGE if case.values[0][2] > 1])
def test_the_last_split_of_a_large_weight_gradient_is_right(x_shape, groups, flat, last_program, monkeypatch):
    geometry, x, _ = large(x_shape, groups)
    dy = untouched(*geometry.y_shape)
    end(dy, BLOCK).copy_(half(*end(dy, BLOCK).shape, seed=3))
    if not flat:
        monkeypatch.setattr(tiles, "candidates", lambda *_: (tiles.Tile(M=32, N=32, K=BLOCK),))
    monkeypatch.setattr(tiles, "splits", lambda target, *, programs, steps, **_: steps)
    taken = []
    with runtime.on_allocate(lambda nbytes, what, tensor: taken.append(tensor) if "split-K" in what else None):
        weight_grad(dy, x, geometry)
    (partial,) = taken  # [splits, Co, R, S, Ci/groups]
    w = torch.zeros(geometry.w_shape, dtype=torch.float64, requires_grad=True)
    y = native_conv2d(end(x, RANDOM).double(), w, padding=1, groups=groups)
    end(y, BLOCK).backward(end(dy, BLOCK).double())
    # The last program serves the last tap at least.
    exact = w.grad.permute(0, 2, 3, 1)[:, -1, -1]
    torch.testing.assert_close(partial[-1][:, -1, -1].double(), exact, rtol=1e-3, atol=1e-1)
    assert exact.abs().max() > 1


@pytest.fixture
def pointwise() -> tuple[ConvGeometry, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A 1x1 convolution of one pixel by more than 2**31 weights: its geometry, x, w and dy.

    Of the weights the last 256 output channels are random, and dy is zero for all others.
    """
    Co, Ci, last = 2**16 + 2**10, 2**15 + 64, 256
    w, dy = untouched(Co, Ci, 1, 1), torch.zeros(1, Co, 1, 1, dtype=torch.float16)
    w[-last:], dy[:, -last:] = half(last, Ci, 1, 1, seed=1), half(1, last, 1, 1, seed=2)
    return ConvGeometry.of((1, Ci, 1, 1), w.shape), half(1, Ci, 1, 1, seed=3), w, dy


def test_a_filter_of_more_than_two_to_the_31_weights_is_read_to_its_end(pointwise, last_program):
    geometry, x, w, _ = pointwise
    exact = torch.einsum("kc,c->k", w[-256:, :, 0, 0].double(), x[0, :, 0, 0].double())
    assert_near(forward(x, w, None, geometry)[0, -256:, 0, 0], exact)


@pytest.mark.parametrize("K", [1024, 2048], ids=["channels-fill-the-blocks", "channels-end-within-a-block"])
def test_an_input_gradient_reads_a_large_filter_to_its_end(K, pointwise, last_program, monkeypatch):
    geometry, _, w, dy = pointwise
    monkeypatch.setattr(tiles, "candidates", lambda *_: (tiles.Tile(M=16, N=64, K=K),))
    dx = input_grad(dy, w, geometry)
    exact = torch.einsum("k,kc->c", dy[0, -256:, 0, 0].double(), w[-256:, -64:, 0, 0].double())
    assert_near(dx[0, -64:, 0, 0], exact)


def test_a_gradient_of_more_than_two_to_the_31_weights_is_written_to_its_end(pointwise, last_program):
    geometry, x, _, dy = pointwise
    dw = weight_grad(dy, x, geometry)
    assert_near(dw[-256:, -64:, 0, 0], torch.outer(dy[0, -256:, 0, 0].double(), x[0, -64:, 0, 0].double()))


@pytest.mark.parametrize(("size", "wide"), [(2**15, False), (2**16, True)])
@pytest.mark.parametrize("groups", [1, 64])
@pytest.mark.parametrize("op", ["forward", "input_grad", "weight_grad"])
def test_compiled_kernels_divide_pixel_numbers_of_the_width_they_need(op, groups, size, wide):
    kernel = compile_ahead(op, (1, 64, size, size), (64, 64 // groups, 3, 3), padding=1, groups=groups)[0]
    divisions = [line for line in kernel.asm["ttir"].splitlines() if "= arith.divsi" in line and "%" in line]
    pixels = "tensor<" if op != "weight_grad" or groups > 1 else ": i"  # whose reduction steps from patch to patch
    widths = {line.rstrip(">")[-3:] for line in (line.partition(" loc(")[0] for line in divisions) if pixels in line}
    assert ("i64" in widths) == wide
    assert widths


def test_indices_are_as_wide_as_their_extents_need():
    assert runtime.index_type(1, 2**31 - 1) == tl.int32
    assert runtime.index_type(1, 2**31) == tl.int64


@pytest.mark.parametrize(
    ("x_shape", "stride"),
    [
        pytest.param((64, 1, 5888, 5888), (5888, 5888), id="many-images-a-patch"),
        pytest.param((1, 1, 64_000, 40_000), (1_000, 40_000), id="one-patch-of-a-large-image"),
    ],
)
def test_a_gpu_tiles_patch_spans_more_than_two_to_the_31_pixels(x_shape, stride, gpu_tiles):
    geometry = ConvGeometry.of(x_shape, (16, 1, 1, 1), stride)
    x, dy = untouched(*x_shape), half(*geometry.y_shape, seed=1)
    pixels = x[:, :, :: stride[0], :: stride[1]]
    pixels.copy_(half(*pixels.shape, seed=2))
    gpu_tiles("sm_90")
    dw = weight_grad(dy, x, geometry)
    assert_near(dw, torch.einsum("nkpq,ncpq->kc", dy.double(), pixels.double())[..., None, None])
