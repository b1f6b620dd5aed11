"""Every kernel compiled for GPUs that this machine does not have."""

import re

import pytest
import torch
from reference import assert_matches

from bench.measure import sass
from kernels import conv2d, runtime
from kernels.forward import forward
from kernels.geometry import ConvGeometry
from kernels.runtime import compile_ahead

OPERATIONS = ["forward", "input_grad", "weight_grad"]
MASKED = ["input_grad_masked", "weight_grad_masked"]
FUSED = ["forward_relu", *MASKED, "bias_grad", "bias_grad_masked"]
POOLS = ["relu_max_pool", "relu_max_pool_grad"]
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_120"]
PRECISIONS = [
    pytest.param(torch.float16, "ieee", id="fp16"),
    pytest.param(torch.bfloat16, "ieee", id="bf16"),
    pytest.param(torch.float32, "tf32", id="tf32"),
    pytest.param(torch.float32, "ieee", id="fp32"),
    pytest.param(torch.float64, "ieee", id="fp64"),
]
CONVOLUTIONS = {  # the kinds that SimpleNet has at 128 px, and those that branch elsewhere
    "7x7s2-3-64": ((256, 3, 128, 128), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "3x3-64": ((256, 64, 32, 32), (64, 64, 3, 3), {"padding": 1}),
    "1x1-64-256": ((256, 64, 32, 32), (256, 64, 1, 1), {}),
    "3x3-128": ((256, 128, 16, 16), (128, 128, 3, 3), {"padding": 1}),
}
DEPTHWISE = {  # of MobileNet and EfficientNet
    "3x3-96": ((64, 96, 56, 56), (96, 1, 3, 3), {"padding": 1, "groups": 96}),
    "5x5s2-144": ((64, 144, 56, 56), (144, 1, 5, 5), {"padding": 2, "stride": 2, "groups": 144}),
}
POOL = ((256, 64, 64, 64), (64, 64, 3, 3), {"stride": 2, "padding": 1})  # SimpleNet's first; of w the window counts
TINY = ((1, 32, 8, 8), (32, 32, 3, 3), {"padding": 12, "stride": 1000})  # every size that can be 1 is 1
ODD_CONVOLUTIONS = {  # compiled; a spill is for the report card to tell
    "3x3s2-nothing-divides": ((7, 20, 33, 31), (36, 10, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "9x9-more-taps-than-bits": ((8, 32, 32, 32), (32, 32, 9, 9), {"padding": 4}),
}

OTHERS = [name for name in CONVOLUTIONS | ODD_CONVOLUTIONS if name != "3x3-64"]
# In these dtypes tests/test_gate.py judges the models' layers; the stem is compiled in tests/test_few_channels.py.
GATED = ("fp16", "tf32", "fp32")
KINDS = [
    pytest.param(convolution, *precision.values, id=f"{convolution}-{precision.id}")
    for convolution in OTHERS
    for precision in PRECISIONS
    if convolution in ODD_CONVOLUTIONS or (convolution != "7x7s2-3-64" and precision.id not in GATED)
]


def assert_compiles(op, convolution, dtype, precision, arch):
    x_shape, w_shape, geometry = (CONVOLUTIONS | ODD_CONVOLUTIONS | DEPTHWISE)[convolution]
    compiled = compile_ahead(op, x_shape, w_shape, dtype=dtype, precision=precision, arch=arch, **geometry)
    names = [kernel.metadata.name for kernel in compiled]
    product = op.removesuffix("_masked").removesuffix("_relu")
    packed = product == "input_grad" and convolution == "7x7s2-3-64"  # all residue classes by forward's kernel
    depthwise = convolution in DEPTHWISE and product in OPERATIONS
    assert f"{'depthwise_' if depthwise else ''}{'forward' if packed else product}_kernel" in names
    for kernel in compiled:
        assert_fits(kernel, arch, may_spill=convolution in ODD_CONVOLUTIONS)


def assert_fits(kernel, arch, *, may_spill=False):
    assert kernel.metadata.target.arch == int(arch.removeprefix("sm_"))
    asked = sass.usage(kernel.asm["cubin"])
    assert asked.registers > 0
    assert asked.stack_bytes == 0 or may_spill, f"{kernel.metadata.name} spills {asked.stack_bytes} bytes"
    # What a block may have: 64 KiB on T4, 163 on A100, 227 on H100, 99 on consumer Ampere, Ada and Blackwell.
    assert kernel.metadata.shared <= {"sm_75": 64, "sm_80": 163, "sm_90": 227, "sm_120": 99}[arch] * 1024


# A mask costs registers, of which float32 needs most: there, and in fp16, tiles of their own were needed.
SLOW_FUSED = [(op, *precision.values) for op in FUSED for precision in PRECISIONS]
FAST_FUSED = [
    *((op, *kind) for op in MASKED for kind in ((torch.float16, "ieee"), (torch.float32, "ieee"))),
    ("forward_relu", torch.float16, "ieee"), ("bias_grad_masked", torch.float16, "ieee"),
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("op", "dtype", "precision"),
    [pytest.param(*one, marks=() if one in FAST_FUSED else pytest.mark.slow) for one in SLOW_FUSED],
)
def test_what_relu_is_fused_into_compiles_without_spills(op, dtype, precision, arch):
    assert_compiles(op, "3x3-64", dtype, precision, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("op", POOLS)
def test_max_pools_compile_without_spills(op, dtype, arch):
    x_shape, w_shape, geometry = POOL
    (kernel,) = compile_ahead(op, x_shape, w_shape, dtype=dtype, arch=arch, **geometry)
    assert kernel.metadata.name == op.removeprefix("relu_") + "_kernel"
    assert_fits(kernel, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_kernel_compiles_without_spills(op, dtype, precision, arch):
    assert_compiles(op, "3x3-64", dtype, precision, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(("convolution", "dtype", "precision"), KINDS)
def test_every_kind_of_convolution_compiles(convolution, op, dtype, precision, arch):
    assert_compiles(op, convolution, dtype, precision, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)  # the others are the gate's
@pytest.mark.parametrize("op", MASKED)
@pytest.mark.parametrize("convolution", OTHERS)
def test_every_kind_of_convolution_compiles_beside_a_mask(convolution, op, dtype, arch):
    assert_compiles(op, convolution, dtype, "ieee", arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [*OPERATIONS, *(pytest.param(op, marks=pytest.mark.slow) for op in MASKED)])
@pytest.mark.parametrize(
    "convolution", ["3x3-96", pytest.param("5x5s2-144", marks=pytest.mark.slow)]
)
def test_every_depthwise_kernel_compiles_without_spills(convolution, op, dtype, arch):
    assert_compiles(op, convolution, dtype, "ieee", arch)


def test_depthwise_kernels_load_and_store_sixteen_bytes_of_channels():
    for op in OPERATIONS:
        kernel = compile_ahead(op, (32, 64, 56, 56), (64, 1, 3, 3), padding=1, groups=64, arch="sm_80")[0]
        assert "ld.global.v4.b32" in kernel.asm["ptx"], op
        assert "st.global.v4.b32" in kernel.asm["ptx"] or op == "weight_grad"


def test_half_precision_uses_tensor_cores_and_16_byte_asynchronous_copies():
    for op in OPERATIONS:
        kernel = compile_ahead(op, (64, 64, 16, 16), (64, 64, 3, 3), padding=1, arch="sm_80")[0]
        assert "mma.sync.aligned.m16n8k16" in kernel.asm["ptx"], op
        assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", kernel.asm["ptx"]), op


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes_of_one_do_not_fold_into_undefined_addresses(arch):
    x_shape, w_shape, geometry = TINY
    for op in OPERATIONS:
        for kernel in compile_ahead(op, x_shape, w_shape, arch=arch, **geometry):
            memory = [line for line in kernel.asm["llir"].splitlines() if "asm sideeffect" in line]
            assert memory, op
            assert not [line for line in memory if "poison" in line], op


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_forward_without_a_bias_and_into_either_layout(layout):
    geometry = ConvGeometry.of((2, 64, 8, 8), (64, 64, 3, 3))
    x, w = (runtime.meta_channels_last(shape, torch.float16) for shape in (geometry.x_shape, geometry.w_shape))
    with runtime.compiling_ahead("sm_80") as launches:
        forward(x, w, None, geometry, memory_format=layout)
    assert len(launches) == 1
    assert "b_ptr" not in function_line(launches[0].kernel)


@pytest.mark.slow
def test_the_other_generations_compile():
    for arch in sorted(set(runtime.MULTIPROCESSORS) - set(ARCHITECTURES)):
        assert compile_ahead("forward", (2, 64, 8, 8), (64, 64, 3, 3), padding=1, arch=arch)
        assert compile_ahead("forward", (2, 64, 8, 8), (64, 1, 3, 3), padding=1, groups=64, arch=arch)
        for op in MASKED:
            assert compile_ahead(op, (2, 64, 8, 8), (64, 64, 3, 3), padding=1, arch=arch)


def function_line(kernel) -> str:
    """The kernel's signature in Triton's IR, with the attributes of each argument."""
    return next(line for line in kernel.asm["ttir"].splitlines() if "tt.func" in line)


def test_split_weight_gradient_brings_its_second_pass_and_a_small_one_does_not():
    names = [k.metadata.name for k in compile_ahead("weight_grad", (256, 64, 32, 32), (64, 64, 3, 3), padding=1)]
    assert names == ["weight_grad_kernel", "sum_splits_kernel"]
    names = [k.metadata.name for k in compile_ahead("weight_grad", (1, 64, 8, 8), (64, 64, 3, 3), padding=1)]
    assert names == ["weight_grad_kernel"]


def test_arguments_are_specialised_as_a_launch_would():
    kernel = compile_ahead("forward", (2, 64, 8, 8), (64, 64, 3, 3), padding=1, arch="sm_80")[0]
    signature = function_line(kernel)
    for name in ("x_ptr", "w_ptr", "b_ptr", "y_ptr"):  # torch allocates at multiples of more than 16 bytes
        assert re.search(rf"%{name}: !tt.ptr<f16> {{tt.divisibility = 16", signature), name
    assert "stride_yc" not in signature  # a stride of 1 is a constant of the channels-last kernel


def test_the_process_still_interprets_afterwards_and_in_between():
    shapes = (1, 4, 6, 6), (3, 4, 3, 3)
    compile_ahead("forward", *shapes, arch="sm_75")
    assert_matches(conv2d, *shapes)
    compile_ahead("weight_grad", *shapes, arch="sm_90")
    assert_matches(conv2d, *shapes)


def test_unknown_names_are_refused():
    shapes = (1, 4, 6, 6), (3, 4, 3, 3)
    with pytest.raises(ValueError, match="unknown operation 'sideways'; known: ") as refused:
        compile_ahead("sideways", *shapes)
    assert set(str(refused.value).partition("known: ")[2].split(", ")) == {*OPERATIONS, *FUSED, *POOLS}
    with pytest.raises(ValueError, match="'sm_42'; known: sm_75"):
        compile_ahead("forward", *shapes, arch="sm_42")
    with pytest.raises(ValueError, match="unsupported dtype torch"):
        compile_ahead("forward", *shapes, dtype=torch.int8)
    with pytest.raises(ValueError, match="'ieee' or 'tf32', got 'fast'"):
        compile_ahead("forward", *shapes, precision="fast")
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
        compile_ahead("forward", (1, 4, 6, 6), (3, 3, 3, 3))


@pytest.mark.parametrize("arch", list(runtime.COMPUTE_UNITS))
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        *((op, dtype) for op in OPERATIONS for dtype in (torch.float16, torch.float32, torch.float64)),
        *(pytest.param(op, torch.float32, marks=pytest.mark.slow) for op in FUSED),
    ],
)
def test_every_kernel_compiles_for_amd_within_its_shared_memory(op, dtype, arch):
    for shape in (CONVOLUTIONS["3x3-64"], DEPTHWISE["3x3-96"]):
        x_shape, w_shape, geometry = shape
        for kernel in compile_ahead(op, x_shape, w_shape, dtype=dtype, arch=arch, **geometry):
            assert kernel.asm["hsaco"]
            assert kernel.metadata.shared <= 64 * 1024


def test_a_launch_ahead_of_time_tells_its_grid_and_its_arguments():
    (launch,) = runtime.launches_ahead("forward", (256, 64, 32, 32), (64, 64, 3, 3), padding=1)
    rows = 256 * 32 * 32
    assert launch.grid == (rows // launch.arguments["BLOCK_M"], 1)
    assert launch.arguments["ROWS"] == rows
    assert launch.arguments["num_warps"] == launch.kernel.metadata.num_warps
