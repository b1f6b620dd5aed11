"""Work counted from geometry and tile, and the time bound: by hand, against the roofline, and against real launches."""

from math import ceil, prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder

from bench.measure.bound import DRAM, ISSUE, MULTIPLY, SHARED, bound, pass_of, roofline
from bench.measure.gpus import FMA, GPUS, TENSOR
from bench.measure.sass import Code, Loop, parse
from bench.measure.work import (
    COPY,
    DEPTHWISE,
    PRODUCT,
    SUM,
    UNKNOWN,
    Work,
    class_taps,
    compulsory_bytes,
    operand_bytes,
    useful_multiply_adds,
    work_of,
    zero_insertion_multiply_adds,
)
from bench.report_card.card import DTYPES, FUSED, OPERATIONS, held_by
from kernels import runtime, tiles
from kernels.forward import forward
from kernels.geometry import ConvGeometry
from kernels.input_grad import input_grad
from kernels.runtime import Target, launches_ahead
from kernels.tiles import Tile
from kernels.weight_grad import weight_grad

A100 = GPUS["sm_80"]
FP16 = torch.float16


def listing(*opcodes: str, begin: int = 0, back: bool = True, operands: str = "R1, R2") -> str:
    """A loop of these instructions, or without `back` a kernel of them."""
    lines = [f"/*{begin + 16 * place:04x}*/ {opcode} {operands} ;" for place, opcode in enumerate(opcodes)]
    end = begin + 16 * len(opcodes)
    return "\n".join([*lines, f"/*{end:04x}*/ @P0 BRA 0x{begin:x} ;" if back else f"/*{end:04x}*/ EXIT ;"])


def code_of(*opcodes: str, back: bool = True) -> Code:
    return Code(instructions=parse(listing(*opcodes, back=back)), registers=64, stack_bytes=0, shared_bytes=0)


def launch_of(name: str, grid: tuple[int, int], **arguments: object) -> SimpleNamespace:
    metadata = SimpleNamespace(name=name)
    return SimpleNamespace(kernel=SimpleNamespace(metadata=metadata), grid=grid, arguments=arguments)


def launches_of(
    op: str, g: ConvGeometry, tile: Tile | None = None, splits: int | None = None, *, dtype: torch.dtype = FP16,
    arch: str = "sm_80", multiprocessors: int = 108,
) -> list[SimpleNamespace]:  # fmt: skip
    """What the launchers launch with this tile and so many splits, or with their own; nothing is compiled."""
    seen = []

    def record(kernel, target, grid, *args, output, **constants):
        named = zip(kernel.compiled.arg_names, args, strict=False)
        numbers = {name: arg for name, arg in named if not isinstance(arg, torch.Tensor)}
        seen.append(launch_of(kernel.name, grid, **numbers, **constants))

    with pytest.MonkeyPatch.context() as patch, runtime.planning(Target(arch, multiprocessors)):
        patch.setattr(runtime, "launch", record)
        if tile:
            patch.setattr(tiles, "candidates", lambda *_: (tile,))
        if splits:
            patch.setattr(tiles, "splits", lambda *_, **__: splits)
        runtime._operations[op](g, dtype, "ieee")
    return seen


def works_of(
    op: str, g: ConvGeometry, tile: Tile | None = None, splits: int | None = None, dtype: torch.dtype = FP16
) -> list[Work]:
    return work_of(op, g, dtype, launches_of(op, g, tile, splits, dtype=dtype))


def product(op: str, g: ConvGeometry, M: int, N: int, K: int, **options: bool) -> Work:
    """Of an operation that launches nothing else."""
    (work,) = works_of(op, g, Tile(M=M, N=N, K=K, **options), splits=1)
    return work


# Geometries small enough to count by brute force, whatever branches they take.
GEOMETRIES = st.builds(
    lambda N, C, K, H, W, R, S, SH, SW, PH, PW, D, groups: ConvGeometry.of(
        (N, C * groups, H + D * (R - 1), W + D * (S - 1)), (K * groups, C, R, S), (SH, SW), (PH, PW), D, groups
    ),
    *(st.integers(1, most) for most in (3, 20, 20, 9, 9, 4, 4, 4, 4)),
    *(st.integers(0, 4) for _ in range(2)), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
TILES = st.builds(
    lambda M, N, K, flat: Tile(M=M, N=N, K=K, flat=flat),
    *(st.sampled_from([16, 32, 64, 128]) for _ in range(3)), st.booleans(),
)  # fmt: skip


@given(GEOMETRIES)
@settings(max_examples=60, deadline=None)
def test_useful_products_and_used_operands_are_those_of_a_convolution_of_ones(g):
    """Its sum counts the products; its gradients are nonzero where an operand is used."""
    x = torch.ones(g.x_shape, requires_grad=True, dtype=torch.float64)
    w = torch.ones(g.w_shape, requires_grad=True, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x, w, None, (g.SH, g.SW), (g.PH, g.PW), (g.DH, g.DW), g.groups)
    y.sum().backward()
    assert useful_multiply_adds(g) == y.sum().item()
    used_x, used_w, used_y = (int((t != 0).sum()) for t in (x.grad, w.grad, y))
    assert operand_bytes("forward", g, torch.float16) == {"x": 2 * used_x, "w": 2 * used_w, "bias": 2 * g.Co}
    assert operand_bytes("input_grad", g, torch.float64) == {"y": 8 * used_y, "w": 8 * used_w}
    assert operand_bytes("weight_grad", g, torch.float32) == {"x": 4 * used_x, "y": 4 * used_y}
    assert operand_bytes("input_grad_masked", g, FP16) == operand_bytes("input_grad", g, FP16) | {"mask": 2 * used_y}


@given(GEOMETRIES, st.sampled_from((*OPERATIONS, *FUSED)), TILES, st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_blocks_hold_at_least_the_useful_products_and_ask_for_at_least_the_compulsory_bytes(g, op, tile, splits):
    works = works_of(op, g, tile, splits)
    (main,) = (work for work in works if work.kind in (PRODUCT, DEPTHWISE))
    assert main.multiply_adds >= useful_multiply_adds(g)
    assert sum(count for count, _ in main.parts) == main.programs
    assert sum(count * each for count, each in main.parts) == main.multiply_adds
    assert list(main.parts) == sorted(main.parts, key=lambda part: -part[1])
    assert sum(work.compulsory for work in works) == compulsory_bytes(op, g, FP16)
    assert sum(work.bytes_requested for work in works) >= compulsory_bytes(op, g, FP16)


@given(
    GEOMETRIES, st.sampled_from((*OPERATIONS, *FUSED)), st.sampled_from(list(DTYPES)), st.sampled_from(list(GPUS)),
    TILES,
    st.sampled_from([1, 4, 8]), st.integers(1, 9), st.none() | st.integers(1, 400),
    st.sampled_from([
        ("LDS.128", "FFMA", "FFMA", "IADD3"), ("LDSM.16.M88.4", "HMMA.16816.F32", "LDGSTS.E.BYPASS.128"),
        ("DMMA.884", "MOV"), ("DFMA",), ("FMUL", "FADD"), ("UTCHMMA", "IADD3"), ("HGMMA.64x64x16.F32", "BAR.SYNC"),
    ]),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_no_bound_is_below_the_roofline(g, op, name, arch, tile, warps, splits, programs, opcodes, is_loop):
    dtype, precision = DTYPES[name]
    gpu = GPUS[arch]
    launches = launches_of(op, g, tile, splits, dtype=dtype, arch=arch, multiprocessors=gpu.multiprocessors)
    if programs and not op.startswith("weight_grad"):  # whose grid tells the splits
        launches[-1].grid = programs, 1  # so that nobody knows which program does what
    works = work_of(op, g, dtype, launches)
    code = code_of(*opcodes, back=is_loop)
    blocks = tile.M, tile.N, tile.K
    found = [bound(gpu, work, code, warps=warps, tile=blocks, dtype=dtype, precision=precision) for work in works]
    seconds = sum(one.seconds for one in found)
    best = roofline(gpu, useful_multiply_adds(g), compulsory_bytes(op, g, dtype), dtype, precision)
    assert seconds >= best.seconds * (1 - 1e-12)
    assert all(one.quantisation >= 1 - 1e-12 for one in found)


@pytest.mark.parametrize(("arch", "images"), [("sm_80", 108), ("sm_90", 132)])
def test_the_bound_is_the_roofline_where_nothing_is_wasted(arch, images):
    """A 1x1 convolution of many channels, whose blocks and programs divide: neither is below the other."""
    gpu, g = GPUS[arch], ConvGeometry.of((images, 4096, 8, 8), (4096, 4096, 1, 1))
    work = product("forward", g, 64, 64, 64)
    code = code_of("HMMA.16816.F32")
    found = bound(gpu, work, code, warps=1, tile=(64, 64, 64), dtype=FP16)
    best = roofline(gpu, useful_multiply_adds(g), compulsory_bytes("forward", g, FP16), FP16)
    assert found.by == best.by == TENSOR
    assert found.seconds == pytest.approx(best.seconds, rel=1e-12)
    each = images * 64 * 4096**2 / gpu.multiprocessors
    assert best.seconds == pytest.approx(each / gpu.tensor[FP16] / gpu.tensor_clock)


# By hand


G64 = ConvGeometry.of((256, 64, 32, 32), (64, 64, 3, 3), 1, 1)


def test_forward_by_hand():
    """2,048 programs of 9 steps of a 128x64x64 tile; each step loads 128x64 of x and 64x64 of w, two bytes each."""
    work = product("forward", G64, 128, 64, 64)
    assert (work.kind, work.programs, work.steps, work.splits) == (PRODUCT, 2048, 9, 1)
    assert work.parts == ((2048, 9 * 128 * 64 * 64),)
    assert work.multiply_adds == G64.multiply_adds
    assert work.bytes_requested == 2048 * (9 * (128 + 64) * 64 * 2 + 128 * 64 * 2 + 64 * 2)
    x = y = 256 * 64 * 32 * 32
    assert work.compulsory == 2 * (x + y + 64 * 64 * 9 + 64)


STEM = ConvGeometry.of((256, 3, 128, 128), (64, 3, 7, 7), 2, 3)
PIXELS = 256 * 64 * 64  # of its output; of its input one in four


def test_flat_reductions_waste_less_on_few_channels_of_a_group():
    """49 taps of 3 channels are 49 blocks, or 147 terms; without groups, windows of 4 * 7 elements, of two blocks."""
    grouped = ConvGeometry.of((256, 6, 128, 128), (128, 3, 7, 7), 2, 3, 1, 2)
    taps, flat = (product("forward", grouped, 128, 64, 16, flat=flat) for flat in (False, True))
    _, windows = works_of("forward", STEM, Tile(M=128, N=64, K=16))
    assert (taps.steps, flat.steps, windows.steps) == (49, 10, 14)


def test_windows_are_written_first_and_multiply_their_zeros_too():
    """A window of a filter row is 7 pixels of 4 channels, and 32 elements with those under no weight."""
    copy, main = works_of("forward", STEM, Tile(M=128, N=64, K=32))
    assert [copy.kind, main.kind] == [COPY, PRODUCT]
    assert main.parts == ((PIXELS // 128, 7 * 32 * 128 * 64),)
    assert main.multiply_adds == 7 * 32 * 64 * PIXELS
    assert copy.multiply_adds == 0
    x, y, w = 256 * 3 * 128 * 128, 64 * PIXELS, 64 * 3 * 49
    assert (copy.compulsory, main.compulsory) == (2 * x, 2 * (w + 64 + y))
    assert main.bytes_requested == PIXELS // 128 * (7 * (128 + 64) * 32 * 2 + 128 * 64 * 2 + 64 * 2)


def test_a_weight_gradient_of_windows_adds_up_their_filter_rows():
    """Of 7 * 32 places, of which the last kernel drops those under no weight."""
    copy, main, total = works_of("weight_grad", STEM, Tile(M=64, N=32, K=64), splits=9)
    assert [work.kind for work in (copy, main, total)] == [COPY, PRODUCT, SUM]
    patches = 256 * 64  # of one row of 64 pixels
    assert main.multiply_adds == 64 * 7 * 32 * 64 * patches
    assert total.bytes_requested == 64 * 7 * 32 * (9 * 4 + 2)
    assert copy.compulsory + main.compulsory + total.compulsory == compulsory_bytes("weight_grad", STEM, FP16)
    assert (main.compulsory, total.compulsory) == (2 * 64 * PIXELS, 2 * 64 * 3 * 49)


def test_packed_classes_multiply_the_taps_that_some_class_lacks_and_the_columns_that_none_has():
    """All 12 columns in a block of 16, and 4x4 taps for each class, which have 9 to 16 of 7x7: 256 for 147."""
    copy, main = works_of("input_grad", STEM, Tile(M=128, N=16, K=64))
    assert [copy.kind, main.kind] == [COPY, PRODUCT]
    assert main.multiply_adds == PIXELS * 16 * 16 * 64
    assert main.parts == ((PIXELS // 128, 16 * 16 * 64 * 128),)
    assert main.bytes_requested == PIXELS // 128 * (16 * (128 + 16) * 64 * 2 + 128 * 16 * 2)  # there is no bias
    assert sorted(class_taps(STEM)) == [9, 12, 12, 16]
    assert main.multiply_adds == PIXELS * 64 * sum(class_taps(STEM)) * 3 * 256 / 147
    assert zero_insertion_multiply_adds(STEM) / main.multiply_adds == pytest.approx(4 * 147 / 256)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(3, 2, 1), (3, 3, 0), (4, 2, 1), (7, 4, 3), (11, 4, 2), (3, (2, 1), 1), (5, (1, 2), 4)],
)
def test_packed_classes_multiply_less_than_zero_insertion_in_the_same_blocks(size, stride, padding):
    """What is executed against what zero insertion would execute, both with the columns that fill a block."""
    g = ConvGeometry.of((16, 3, 48, 48), (32, 3, size, size), stride, padding)
    assert tiles.packs_classes(Target("sm_80", 108), g)
    _, main = works_of("input_grad", g, Tile(M=16, N=16, K=32))
    columns = -(-g.SH * g.SW * 3 // 16) * 16
    taps = -(-(size + g.SH - 1) // g.SH) * -(-(size + g.SW - 1) // g.SW)  # at most: some class has the first and last
    assert main.multiply_adds <= g.N * (48 // g.SH) * (48 // g.SW) * columns * taps * 32
    assert useful_multiply_adds(g) <= main.multiply_adds < zero_insertion_multiply_adds(g) * 16 / 3


@pytest.mark.parametrize(
    ("side", "K", "patches"),
    [
        pytest.param(32, 64, 16, id="nothing-over-the-edge"),
        pytest.param(28, 64, 14, id="2x32-for-28-columns"),
        pytest.param(7, 64, 1, id="8x8-for-7x7"),
        pytest.param(7, 128, 1 / 2, id="two-images-a-patch"),
        pytest.param(4, 64, 1 / 4, id="four-images-a-patch"),
        pytest.param(3, 32, 1 / 2, id="two-images-of-4x4-for-3x3"),
    ],
)
def test_patches_of_a_weight_gradient_multiply_what_lies_over_the_edge(side, K, patches):
    """Of 5 images, so that the last patch of several lacks some."""
    g = ConvGeometry.of((5, 64, side, side), (64, 64, 3, 3), 1, 1)
    work = product("weight_grad", g, 64, 64, K)
    count = ceil(5 * patches)
    assert (work.steps, work.multiply_adds) == (count, 64 * 64 * 9 * K * count)


def test_the_last_split_of_patches_has_what_is_left():
    """70 patches: three splits of 18 and one of 16; 41 in ten splits of 5: the last has none."""
    for splits, images, shares in ((4, 5, [(27, 18), (9, 16)]), (10, 41, [(72, 5), (9, 1), (9, 0)])):
        side = 28 if images == 5 else 8
        g = ConvGeometry.of((images, 64, side, side), (64, 64, 3, 3), 1, 1)
        main, _ = works_of("weight_grad", g, Tile(M=64, N=64, K=64), splits)
        assert main.parts == tuple((count, steps * 64**3) for count, steps in shares)
        assert main.multiply_adds == sum(count * steps for count, steps in shares) * 64**3
        flat, _ = works_of("weight_grad", g, Tile(M=64, N=64, K=64, flat=True), splits)
        assert len(flat.parts) == 1


@pytest.mark.parametrize(("stride", "times"), [(1, 1), (2, 4), (3, 9), ((2, 1), 2)])
def test_a_strided_input_gradient_multiplies_less_than_zero_insertion(stride, times):
    g = ConvGeometry.of((4, 64, 36, 36), (64, 64, 3, 3), stride, 1)
    work = product("input_grad", g, 16, 64, 64)
    assert zero_insertion_multiply_adds(g) / work.multiply_adds == pytest.approx(times)
    assert sum(class_taps(g)) == 9


def test_residue_classes_have_their_own_share_of_the_taps():
    """Of a 3x3 filter with stride 2 the four classes have 4, 2, 2 and 1 taps; of 1x1 three have none."""
    assert sorted(class_taps(ConvGeometry.of((1, 8, 8, 8), (8, 8, 3, 3), 2, 1))) == [1, 2, 2, 4]
    assert sorted(class_taps(ConvGeometry.of((1, 8, 8, 8), (8, 8, 1, 1), 2))) == [0, 0, 0, 1]
    # Two rows of four classes: filter row 1 meets the first, filter row 2 the second.
    assert class_taps(ConvGeometry.of((1, 8, 2, 2), (8, 8, 3, 3), 4, 1)) == [1, 1, 1, 1]
    work = product("input_grad", ConvGeometry.of((1, 64, 32, 32), (64, 64, 3, 3), 2, 1), 64, 64, 64)
    assert [count for count, _ in work.parts] == [4, 4, 4, 4]
    assert [each // (64 * 64 * 64) for _, each in work.parts] == [4, 2, 2, 1]


def test_a_split_weight_gradient_writes_and_reads_its_workspace():
    main, second = works_of("weight_grad", G64, Tile(M=64, N=64, K=64), splits=24)
    steps = -(-4096 // 24)
    elements = 64 * 64 * 9
    assert (main.splits, main.steps, main.programs) == (24, steps, 216)
    assert main.bytes_requested == 9 * 4096 * 128 * 64 * 2 + 216 * 64 * 64 * 4
    assert (second.kind, second.multiply_adds) == (SUM, 0)
    assert second.bytes_requested == 24 * elements * 4 + elements * 2
    assert main.compulsory + second.compulsory == compulsory_bytes("weight_grad", G64, FP16)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((256, 64, 32, 32), (64, 64, 3, 3), dict(padding=1)),
        ((256, 3, 128, 128), (64, 3, 7, 7), dict(stride=2, padding=3)),
        ((64, 96, 56, 56), (96, 1, 3, 3), dict(padding=1, groups=96)),
    ],
    ids=["3x3", "stem", "depthwise"],
)
def test_a_mask_is_read_as_often_as_the_output_gradient_and_multiplies_nothing(x_shape, w_shape, options):
    g = ConvGeometry.of(x_shape, w_shape, **options)
    for op in ("input_grad", "weight_grad"):
        plain, masked = (works_of(name, g, Tile(M=64, N=32, K=16), splits=4) for name in (op, f"{op}_masked"))
        main, main_masked = ([w for w in works if w.kind in (PRODUCT, DEPTHWISE)] for works in (plain, masked))
        ((one,), (other,)) = main, main_masked
        assert one.multiply_adds == other.multiply_adds
        assert other.compulsory - one.compulsory == g.N * g.Co * g.P * g.Q * 2
        depth = 1 if one.kind == DEPTHWISE else 16  # elements of a row of dy's block
        columns = 32 if one.kind == DEPTHWISE else depth
        steps = sum(count * each for count, each in one.parts) // (64 * 32 * depth)
        assert other.bytes_requested - one.bytes_requested == steps * 64 * columns * 2


def test_relu_in_the_epilogue_counts_as_nothing():
    g = ConvGeometry.of((8, 64, 16, 16), (64, 64, 3, 3), 1, 1)
    assert works_of("forward_relu", g) == works_of("forward", g)


def test_depthwise_kernels_are_counted_tap_by_tap():
    g = ConvGeometry.of((8, 64, 32, 32), (64, 1, 3, 3), 1, 1, 1, 64)
    (launch,) = launches_of("forward", g)
    assert (launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"], launch.grid) == (32, 64, (256, 1))
    (work,) = work_of("forward", g, FP16, [launch])
    assert (work.kind, work.steps) == (DEPTHWISE, 9)
    assert work.multiply_adds == g.multiply_adds
    assert work.bytes_requested == 256 * 2 * (9 * (32 * 64 + 64) + 32 * 64)


def test_an_unknown_kernel_is_not_guessed_at():
    (work,) = work_of("forward", G64, FP16, [launch_of("sort_kernel", (7, 3), BLOCK=64)])
    assert work == Work(kind=UNKNOWN, programs=21)


def equal_programs(count: int, each: int = 2**20) -> Work:
    return Work(kind=PRODUCT, programs=count, parts=((count, each),), multiply_adds=count * each)


def test_multiplying_by_hand_and_what_a_program_too_many_costs():
    """2**20 multiply-adds take 1,024 cycles of an A100's multiprocessor, and 109 programs as long as 216."""
    code = code_of("HMMA.16816.F32")
    for programs, rounds in ((1, 1), (108, 1), (109, 2), (216, 2)):
        found = bound(A100, equal_programs(programs), code, warps=4, tile=(128, 64, 64), dtype=FP16)
        assert found.parts[MULTIPLY] == pytest.approx(rounds * 1024 / 1.41e9)
        assert found.quantisation == pytest.approx(rounds * 108 / programs)
        assert found.by == TENSOR


def test_unequal_programs_are_bound_by_the_longest_of_them():
    """108 programs of 3 units and 1 of 1: the mean is 3.01, the longest 3, and some multiprocessor has two, of >= 1."""
    unit = 2**20
    code = code_of("HMMA.16816.F32")

    def rounds(*parts: tuple[int, int]) -> float:
        work = Work(
            kind=PRODUCT, programs=sum(count for count, _ in parts), parts=parts,
            multiply_adds=sum(count * each for count, each in parts),
        )  # fmt: skip
        found = bound(A100, work, code, warps=4, tile=(128, 64, 64), dtype=FP16)
        return found.parts[MULTIPLY] * 1.41e9 / 1024

    assert rounds((108, 3 * unit), (1, unit)) == pytest.approx(325 / 108)
    assert rounds((109, 3 * unit), (1, unit)) == pytest.approx(6)
    assert rounds((1, 50 * unit), (1, unit)) == pytest.approx(50)
    assert rounds((60, 30 * unit), (60, 29 * unit)) == pytest.approx(2 * 29)


def test_tensor_cores_multiply_at_their_own_clock_and_instructions_are_issued_at_the_other():
    code = code_of("HGMMA.64x64x16.F32")
    found = bound(GPUS["sm_90"], equal_programs(132), code, warps=4, tile=(64, 64, 16), dtype=FP16)
    assert found.parts[MULTIPLY] == pytest.approx(2**20 / 2048 / 1.83e9)
    assert found.parts[ISSUE] == pytest.approx(16 * 2 * 4 / 4 / 1.98e9)


def test_issue_slots_and_shared_memory_by_hand():
    """A pass of 4 warps: 4 x 4 instructions at 4 a cycle, 512 bytes read and up to 512 written for a warp at 128."""
    code = code_of("LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "HMMA.16816.F32")
    tile = (128, 64, 64)
    once = pass_of(code.main_loop, warps=4, tile=tile, itemsize=2)
    assert (once.multiply_adds, once.instructions) == (4 * 2048, 16)
    assert once.shared_bytes == 4 * 512 + (128 + 64) * 2  # one column of the tile is all that can be written in it
    work = equal_programs(108, each=1000 * 4 * 2048)
    found = bound(A100, work, code, warps=4, tile=tile, dtype=FP16)
    assert found.parts[ISSUE] == pytest.approx(1000 * 16 / 4 / 1.41e9)
    assert found.parts[SHARED] == pytest.approx(1000 * once.shared_bytes / 128 / 1.41e9)


def test_multiply_adds_outside_the_loop_are_not_asked_of_it():
    """Half of a program of two passes is done before the loop: one pass is left."""
    text = listing("HMMA.16816.F32", back=False).replace("EXIT", "NOP")
    text += "\n" + listing("HMMA.16816.F32", "IADD3", begin=0x20)
    code = Code(instructions=parse(text), registers=64, stack_bytes=0, shared_bytes=0)
    found = bound(A100, equal_programs(108, 2 * 4 * 2048), code, warps=4, tile=(16, 16, 16), dtype=FP16)
    assert found.parts[ISSUE] == pytest.approx(3 * 4 / 4 / 1.41e9)


def test_an_unrolled_kernel_is_executed_once():
    code = code_of("HMMA.16816.F32", "IADD3", "HMMA.16816.F32", "STG.E.128", back=False)
    assert code.main_loop is None
    found = bound(A100, equal_programs(108, 2 * 4 * 2048), code, warps=4, tile=(16, 16, 16), dtype=FP16)
    assert found.parts[ISSUE] == pytest.approx(3 * 4 / 4 / 1.41e9)  # to its last multiply-add


def test_tensor_cores_of_sm_100_take_their_size_from_the_tile():
    text = "\n".join(
        f"/*00{place}0*/ UTCHMMA gdesc[UR1{place}], gdesc[UR2{place}], tmem[UR8], tmem[UR30], idesc[UR31], UPT ;"
        for place in range(4)
    )
    loop = Loop(parse(text))
    once = pass_of(loop, warps=4, tile=(128, 64, 64), itemsize=2)
    assert once.multiply_adds == 128 * 64 * 64
    assert once.shared_bytes == 4 * (128 + 64) * 32
    assert pass_of(loop, warps=4, tile=(128, 64, 32), itemsize=4).multiply_adds == 128 * 64 * 32


@pytest.mark.parametrize(
    ("operands", "read"),
    [("R56, gdesc[UR4], R56", (64 + 128) * 32), ("R56, R4, gdesc[UR4], R56", 128 * 32)],
    ids=["both-from-shared-memory", "left-from-registers"],
)
def test_what_four_warps_read_for_one_hopper_instruction(operands, read):
    loop = Loop(parse(f"/*0000*/ HGMMA.64x128x16.F32 {operands} ;"))
    once = pass_of(loop, warps=4, tile=(64, 128, 16), itemsize=2)
    assert (once.multiply_adds, once.shared_bytes) == (64 * 128 * 16, read)


def test_ffma_loops_multiply_on_fma_units_and_a_sum_is_bound_by_memory():
    t4 = GPUS["sm_75"]
    found = bound(t4, equal_programs(40), code_of("FFMA"), warps=4, tile=(64, 64, 16), dtype=torch.float32)
    assert (found.unit, found.parts[MULTIPLY]) == (FMA, pytest.approx(2**20 / 64 / 1.59e9))
    total = bound(
        t4, Work(kind=SUM, programs=1, compulsory=320_000), code_of("FADD"), warps=4, tile=(1, 1, 1), dtype=FP16
    )
    assert (total.by, total.seconds) == (DRAM, pytest.approx(1e-6))


@pytest.mark.parametrize(
    ("columns", "blocks", "limit"),
    [(0, 16, "warps"), (32, 16, "warps"), (64, 8, "tensor memory"), (512, 1, "tensor memory")],
)
def test_accumulators_of_sm_100_share_tensor_memory(columns, blocks, limit):
    metadata = SimpleNamespace(num_warps=4, shared=0, tmem_size=columns)
    launch = SimpleNamespace(kernel=SimpleNamespace(metadata=metadata), arguments={})
    code = Code(instructions=(), registers=32, stack_bytes=0, shared_bytes=0)
    held = held_by(GPUS["sm_100"], launch, code)
    assert (held.blocks, held.limit, held.share) == (blocks, limit, blocks * 4 / 64)


# Real launches


# Name: (x, w, options).
REAL = {
    "3x3": ((256, 64, 32, 32), (64, 64, 3, 3), dict(padding=1)),
    "3x3s2": ((8, 128, 16, 16), (256, 128, 3, 3), dict(padding=1, stride=2)),
    "depthwise": ((8, 64, 16, 16), (64, 1, 3, 3), dict(padding=1, groups=64)),
    "stem": ((8, 3, 128, 128), (64, 3, 7, 7), dict(padding=3, stride=2)),
}
RAGGED = {
    "28x28": ((33, 64, 28, 28), (64, 64, 3, 3), dict(padding=1)),
    "7x7": ((33, 128, 7, 7), (64, 128, 3, 3), dict(padding=1)),
    "4x4-several-a-patch": ((33, 64, 4, 4), (64, 64, 3, 3), dict(padding=1)),
}


@pytest.mark.parametrize(
    ("op", "name"), [*((op, name) for op in OPERATIONS for name in REAL), *(("weight_grad", name) for name in RAGGED)]
)
def test_the_grid_of_a_real_launch_is_understood(op, name):
    """Which program does what is known: otherwise wave quantisation would be left out silently."""
    x_shape, w_shape, options = (REAL | RAGGED)[name]
    g = ConvGeometry.of(x_shape, w_shape, **options)
    launches = launches_ahead(op, x_shape, w_shape, **options, dtype=FP16, arch="sm_80")
    works = work_of(op, g, FP16, launches)
    copies = [work.kind for work in works].count(COPY)
    assert copies == (name == "stem")
    main = works[copies]
    assert main.programs == prod(launches[copies].grid) == sum(count for count, _ in main.parts)
    assert [work.kind for work in works[copies + 1 :]] in ([], [SUM])
    # Windows and classes, and two images of 8x8 a patch, of which the last has one, are counted by hand above.
    most = {"stem": 256 / 147, "7x7": 17 * 128 / (33 * 49)}.get(name, 1.3)
    assert useful_multiply_adds(g) <= main.multiply_adds < most * g.multiply_adds + 64**3 * 9


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", ["3x3", "stem", "7x7"])
def test_what_tests_here_take_for_launches_is_what_is_launched(name, op):
    x_shape, w_shape, options = (REAL | RAGGED)[name]
    real = launches_ahead(op, x_shape, w_shape, **options, dtype=FP16, arch="sm_80")
    ours = launches_of(op, ConvGeometry.of(x_shape, w_shape, **options))
    for one, other in zip(real, ours, strict=True):
        assert (one.kernel.metadata.name, one.grid) == (other.kernel.metadata.name, other.grid)
        assert one.arguments == other.arguments


@pytest.fixture
def multiplied(monkeypatch) -> list[int]:
    """Multiply-adds of each matrix product that interpreted kernels execute."""
    seen = []
    dot = InterpreterBuilder.create_dot

    def count(self, a, b, *arguments):
        seen.append(prod(a.data.shape) * b.data.shape[1])
        return dot(self, a, b, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    return seen


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        pytest.param((5, 20, 14, 14), (36, 20, 3, 3), dict(padding=1), id="nothing-divides"),
        pytest.param((5, 32, 7, 7), (32, 32, 3, 3), dict(padding=1), id="7x7"),
        pytest.param((5, 32, 4, 4), (32, 32, 3, 3), dict(padding=1), id="several-images-a-patch"),
        pytest.param((2, 32, 28, 28), (32, 16, 3, 3), dict(padding=1, stride=2, groups=2), id="classes-and-groups"),
        pytest.param((2, 3, 30, 22), (16, 3, 7, 7), dict(padding=3, stride=2), id="stem"),
        pytest.param((2, 6, 13, 13), (8, 3, 3, 3), dict(padding=1, groups=2), id="few-channels-of-a-group"),
    ],
)
def test_multiply_adds_are_those_that_the_interpreter_executes(op, x_shape, w_shape, options, gpu_tiles, multiplied):
    g = ConvGeometry.of(x_shape, w_shape, **options)
    gpu_tiles("sm_80")
    expected = work_of(op, g, FP16, launches_of(op, g, multiprocessors=8))
    x, w, y = (torch.ones(shape, dtype=FP16) for shape in (g.x_shape, g.w_shape, g.y_shape))
    if op == "forward":
        forward(x, w, None, g)
    elif op == "input_grad":
        input_grad(y, w, g)
    else:
        weight_grad(y, x, g)
    assert sum(multiplied) == sum(work.multiply_adds for work in expected) > 0
