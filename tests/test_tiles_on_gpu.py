"""Each candidate tile by itself, compiled and run on the GPU at hand (pytest --device cuda).

A launch takes one tile, so a broken one can hide behind a good one until tuning picks it. tests/test_tiles.py does the
same in the interpreter, which forgives what compilers and shared memory do not.
"""

from functools import cache

import pytest
import reference
import torch
from reference import TOLERANCE, native_conv2d, random, results

from kernels import few_channels, runtime, tiles
from kernels.forward import forward
from kernels.geometry import ConvGeometry
from kernels.input_grad import input_grad
from kernels.weight_grad import weight_grad

pytestmark = pytest.mark.on_device

LAST = torch.channels_last

# name -> x, w, geometry. The slow ones are left out by `gpu-check --quick`.
CASES = {
    "channels-divide": ((4, 64, 16, 16), (64, 64, 3, 3), {"padding": 1}),
    "channels-do-not-divide": ((2, 20, 13, 11), (36, 20, 3, 3), {"padding": 1}),
    "three-channels": ((3, 3, 33, 31), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "pointwise": ((4, 128, 14, 14), (256, 128, 1, 1), {}),
    "groups-and-stride": ((2, 64, 9, 9), (64, 32, 3, 3), {"stride": (2, 1), "padding": 1, "groups": 2}),
    "dilation": ((2, 48, 15, 17), (96, 48, 3, 5), {"stride": (2, 3), "padding": 4, "dilation": (3, 2)}),
    "many-pixels": ((32, 32, 56, 56), (32, 32, 3, 3), {"padding": 1}),
}
SLOW = ("pointwise", "groups-and-stride", "dilation", "many-pixels")

PRECISIONS = [(dtype, "ieee") for dtype in runtime.DTYPES] + [(torch.float32, "tf32")]
# As TOLERANCE. A tensor core drops all but ten bits of both operands' fractions: 2**-10 of each.
TF32_TOLERANCE = 2.0**-9


def launch(op: str, x, w, b, dy, geometry: ConvGeometry, precision: str) -> torch.Tensor:
    if op == "forward":
        return forward(x, w, b, geometry, precision=precision)
    if op == "input_grad":
        return input_grad(dy, w, geometry, precision=precision)
    return weight_grad(dy, x, geometry, precision=precision)


@cache
def operands(case: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, w, bias and dy, on the CPU."""
    x_shape, w_shape, options = CASES[case]
    shapes = x_shape, w_shape, w_shape[:1], ConvGeometry.of(x_shape, w_shape, **options).y_shape
    return tuple(random(*shape, dtype=dtype, seed=seed).cpu() for seed, shape in enumerate(shapes))


@cache
def exact(case: str, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each operation's result in float64, and the same of absolute values, which rounding errors are a share of."""
    wide = [t.double() for t in operands(case, dtype)]
    of_values, of_sizes = (
        results(native_conv2d, *tensors, **CASES[case][2]) for tensors in (wide, [t.abs() for t in wide])
    )
    names = ("forward", "input_grad", "weight_grad")
    return {name: pair for name, *pair in zip(names, of_values, of_sizes, strict=False)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = ("op", "dtype", "precision", "case", "tile")
    if reference.DEVICE.type != "cuda":
        skip = pytest.mark.skip("compiled tiles run on a GPU only: --device cuda")
        metafunc.parametrize(names, [pytest.param(*[None] * len(names), marks=skip, id="no-gpu")])
        return
    target = runtime.target_for(reference.DEVICE)
    found = []
    for case, (x_shape, w_shape, options) in CASES.items():
        geometry = ConvGeometry.of(x_shape, w_shape, **options)
        marks = [pytest.mark.slow] if case in SLOW else []
        for op in ("forward", "input_grad", "weight_grad"):
            for dtype, precision in PRECISIONS:
                product = few_channels.product_of(op, target, geometry)
                for i, tile in enumerate(tiles.candidates(product[0], target, product[1], dtype, precision)):
                    name = f"{op}-{str(dtype).removeprefix('torch.')}-{precision}-{case}-{i}"
                    found.append(pytest.param(op, dtype, precision, case, tile, marks=marks, id=name))
    metafunc.parametrize(names, found)


def test_each_tile_is_right_by_itself(op, dtype, precision, case, tile, monkeypatch):
    asked = []
    monkeypatch.setattr(tiles, "candidates", lambda *arguments: asked.append(arguments) or (tile,))
    x, w, b, dy = (t.to(reference.DEVICE) for t in operands(case, dtype))
    x, w, dy = (t.contiguous(memory_format=LAST) for t in (x, w, dy))
    geometry = ConvGeometry.of(x.shape, w.shape, **CASES[case][2])
    # What is not written must show: memory that was just freed may hold the right result of the tile before.
    with runtime.on_allocate(lambda nbytes, what, tensor: tensor.fill_(float("nan"))):
        result = launch(op, x, w, b, dy, geometry, precision).cpu().double()
    assert asked
    value, size = exact(case, dtype)[op]
    tolerance = TF32_TOLERANCE if precision == "tf32" else TOLERANCE[dtype]
    excess = (result - value).abs() - tolerance * size
    assert not excess.isnan().any(), "parts of the result were not written"
    assert excess.max() <= 0, f"off by {excess.max():.3g} more than rounding explains"
