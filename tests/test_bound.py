"""Work counted from geometry and tile, and the time bound: by hand, against the roofline, and against real launches."""

from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.measure.bound import DRAM, ISSUE, MULTIPLY, SHARED, bound, pass_of, roofline
from bench.measure.gpus import FMA, GPUS, TENSOR
from bench.measure.sass import Code, Loop, parse
from bench.measure.work import (
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
from bench.report_card.card import DTYPES, OPERATIONS, held_by
from kernels.geometry import ConvGeometry
from kernels.runtime import launches_ahead

A100 = GPUS["sm_80"]
FP16 = torch.float16


def listing(*opcodes: str, begin: int = 0, back: bool = True, operands: str = "R1, R2") -> str:
    """A loop of these instructions, or without `back` a kernel of them."""
    lines = [f"/*{begin + 16 * place:04x}*/ {opcode} {operands} ;" for place, opcode in enumerate(opcodes)]
    end = begin + 16 * len(opcodes)
    return "\n".join([*lines, f"/*{end:04x}*/ @P0 BRA 0x{begin:x} ;" if back else f"/*{end:04x}*/ EXIT ;"])


def code_of(*opcodes: str, back: bool = True) -> Code:
    return Code(parse(listing(*opcodes, back=back)), registers=64, stack_bytes=0, shared_bytes=0)


def launch_of(name: str, grid: tuple[int, int], **arguments: object) -> SimpleNamespace:
    metadata = SimpleNamespace(name=name)
    return SimpleNamespace(kernel=SimpleNamespace(metadata=metadata), grid=grid, arguments=arguments)


def product(op: str, g: ConvGeometry, M: int, N: int, K: int, programs: int, **more: object) -> Work:
    (work,) = work_of(
        op, g, FP16, [launch_of(f"{op}_kernel", (programs, 1), BLOCK_M=M, BLOCK_N=N, BLOCK_K=K, **more)]
    )
    return work


# Geometries small enough to count by brute force, whatever branches they take.
GEOMETRIES = st.builds(
    lambda N, C, K, H, W, R, S, SH, SW, PH, PW, D, groups: ConvGeometry.of(
        (N, C * groups, H + D * (R - 1), W + D * (S - 1)), (K * groups, C, R, S), (SH, SW), (PH, PW), D, groups
    ),
    *(st.integers(1, most) for most in (3, 20, 20, 9, 9, 4, 4, 4, 4)),
    *(st.integers(0, 4) for _ in range(2)), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
BLOCKS = st.tuples(*(st.sampled_from([16, 32, 64, 128]) for _ in range(3)))


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
    assert operand_bytes("forward", g, torch.float16) == 2 * (used_x + used_w + g.Co)
    assert operand_bytes("input_grad", g, torch.float64) == 8 * (used_y + used_w)
    assert operand_bytes("weight_grad", g, torch.float32) == 4 * (used_x + used_y)


@given(GEOMETRIES, st.sampled_from(OPERATIONS), BLOCKS, st.booleans(), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_blocks_hold_at_least_the_useful_products_and_ask_for_at_least_the_compulsory_bytes(g, op, blocks, flat, split):
    work = product(op, g, *blocks, programs=split, FLAT=flat)
    assert work.multiply_adds >= useful_multiply_adds(g)
    if work.parts:
        assert sum(count for count, _ in work.parts) == work.programs
        assert sum(count * each for count, each in work.parts) == work.multiply_adds
    if work.splits == 1:
        assert work.compulsory == compulsory_bytes(op, g, FP16)
        assert work.bytes_requested >= work.compulsory


@given(
    GEOMETRIES, st.sampled_from(OPERATIONS), st.sampled_from(list(DTYPES)), st.sampled_from(list(GPUS)), BLOCKS,
    st.sampled_from([1, 4, 8]), st.integers(1, 400),
    st.sampled_from([
        ("LDS.128", "FFMA", "FFMA", "IADD3"), ("LDSM.16.M88.4", "HMMA.16816.F32", "LDGSTS.E.BYPASS.128"),
        ("DMMA.884", "MOV"), ("DFMA",), ("FMUL", "FADD"), ("UTCHMMA", "IADD3"), ("HGMMA.64x64x16.F32", "BAR.SYNC"),
    ]),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_no_bound_is_below_the_roofline(g, op, name, arch, blocks, warps, programs, opcodes, is_loop):
    dtype, precision = DTYPES[name]
    gpu = GPUS[arch]
    launches = [
        launch_of(f"{op}_kernel", (programs, 1), **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))),
        launch_of("sum_splits_kernel", (1, 1), BLOCK=256),
    ]
    works = work_of(op, g, dtype, launches)
    works = works if works[0].splits > 1 else works[:1]
    code = code_of(*opcodes, back=is_loop)
    found = [bound(gpu, work, code, warps=warps, tile=blocks, dtype=dtype, precision=precision) for work in works]
    seconds = sum(one.seconds for one in found)
    best = roofline(gpu, useful_multiply_adds(g), compulsory_bytes(op, g, dtype), dtype, precision)
    assert seconds >= best.seconds * (1 - 1e-12)
    assert found[0].quantisation >= 1 - 1e-12


@pytest.mark.parametrize(("arch", "images"), [("sm_80", 108), ("sm_90", 132)])
def test_the_bound_is_the_roofline_where_nothing_is_wasted(arch, images):
    """A 1x1 convolution of many channels, whose blocks and programs divide: neither is below the other."""
    gpu, g = GPUS[arch], ConvGeometry.of((images, 4096, 8, 8), (4096, 4096, 1, 1))
    work = product("forward", g, 64, 64, 64, 64 * images)
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
    work = product("forward", G64, 128, 64, 64, 2048)
    assert (work.kind, work.programs, work.steps, work.splits) == (PRODUCT, 2048, 9, 1)
    assert work.parts == ((2048, 9 * 128 * 64 * 64),)
    assert work.multiply_adds == G64.multiply_adds
    assert work.bytes_requested == 2048 * (9 * (128 + 64) * 64 * 2 + 128 * 64 * 2 + 64 * 2)
    x = y = 256 * 64 * 32 * 32
    assert work.compulsory == 2 * (x + y + 64 * 64 * 9 + 64)


def test_flat_reductions_waste_less_on_few_channels():
    stem = ConvGeometry.of((256, 3, 128, 128), (64, 3, 7, 7), 2, 3)
    rows = 256 * 64 * 64
    flat = product("forward", stem, 128, 64, 16, rows // 128, FLAT=True)
    taps = product("forward", stem, 128, 64, 16, rows // 128, FLAT=False)
    assert (flat.steps, taps.steps) == (10, 49)  # 147 terms, and 49 taps of 3 channels


@pytest.mark.parametrize(("stride", "times"), [(1, 1), (2, 4), (3, 9), ((2, 1), 2)])
def test_a_strided_input_gradient_multiplies_less_than_zero_insertion(stride, times):
    g = ConvGeometry.of((4, 64, 36, 36), (64, 64, 3, 3), stride, 1)
    rows, columns = g.residue_classes
    programs = -(-g.residue_class_pixels // 16) * rows * columns
    work = product("input_grad", g, 16, 64, 64, programs)
    assert zero_insertion_multiply_adds(g) / work.multiply_adds == pytest.approx(times)
    assert sum(class_taps(g)) == 9


def test_residue_classes_have_their_own_share_of_the_taps():
    """Of a 3x3 filter with stride 2 the four classes have 4, 2, 2 and 1 taps; of 1x1 three have none."""
    assert sorted(class_taps(ConvGeometry.of((1, 8, 8, 8), (8, 8, 3, 3), 2, 1))) == [1, 2, 2, 4]
    assert sorted(class_taps(ConvGeometry.of((1, 8, 8, 8), (8, 8, 1, 1), 2))) == [0, 0, 0, 1]
    # Two rows of four classes: filter row 1 meets the first, filter row 2 the second.
    assert class_taps(ConvGeometry.of((1, 8, 2, 2), (8, 8, 3, 3), 4, 1)) == [1, 1, 1, 1]
    work = product("input_grad", ConvGeometry.of((1, 64, 32, 32), (64, 64, 3, 3), 2, 1), 64, 64, 64, 16)
    assert [count for count, _ in work.parts] == [4, 4, 4, 4]
    assert [each // (64 * 64 * 64) for _, each in work.parts] == [4, 2, 2, 1]


def test_a_split_weight_gradient_writes_and_reads_its_workspace():
    launches = [
        launch_of("weight_grad_kernel", (9, 24), BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, FLAT=False),
        launch_of("sum_splits_kernel", (144, 1), BLOCK=256),
    ]
    main, second = work_of("weight_grad", G64, FP16, launches)
    steps = -(-4096 // 24)
    elements = 64 * 64 * 9
    assert (main.splits, main.steps, main.programs) == (24, steps, 216)
    assert main.bytes_requested == 216 * (steps * 128 * 64 * 2 + 64 * 64 * 4)
    assert (second.kind, second.multiply_adds) == (SUM, 0)
    assert second.bytes_requested == 24 * elements * 4 + elements * 2
    assert main.compulsory + second.compulsory == compulsory_bytes("weight_grad", G64, FP16)


def test_depthwise_kernels_are_counted_tap_by_tap():
    g = ConvGeometry.of((8, 64, 32, 32), (64, 1, 3, 3), 1, 1, 1, 64)
    (work,) = work_of("forward", g, FP16, [launch_of("depthwise_forward_kernel", (256, 1), BLOCK_M=32, BLOCK_N=64)])
    assert (work.kind, work.steps) == (DEPTHWISE, 9)
    assert work.multiply_adds == g.multiply_adds
    assert work.bytes_requested == 256 * 2 * (9 * (32 * 64 + 64) + 32 * 64)


def test_an_unknown_kernel_is_not_guessed_at():
    (work,) = work_of("forward", G64, FP16, [launch_of("pad_kernel", (7, 3), BLOCK=64)])
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
    code = Code(parse(text), registers=64, stack_bytes=0, shared_bytes=0)
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
    code = Code((), registers=32, stack_bytes=0, shared_bytes=0)
    held = held_by(GPUS["sm_100"], launch, code)
    assert (held.blocks, held.limit, held.share) == (blocks, limit, blocks * 4 / 64)


# Real launches


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        pytest.param((256, 64, 32, 32), (64, 64, 3, 3), dict(padding=1), id="3x3"),
        pytest.param((8, 128, 16, 16), (256, 128, 3, 3), dict(padding=1, stride=2), id="3x3s2"),
        pytest.param((8, 64, 16, 16), (64, 1, 3, 3), dict(padding=1, groups=64), id="depthwise"),
    ],
)
def test_the_grid_of_a_real_launch_is_understood(op, x_shape, w_shape, options):
    """Which program does what is known: otherwise wave quantisation would be left out silently."""
    g = ConvGeometry.of(x_shape, w_shape, **options)
    launches = launches_ahead(op, x_shape, w_shape, **options, dtype=FP16, arch="sm_80")
    works = work_of(op, g, FP16, launches)
    assert works[0].programs == prod(launches[0].grid) == sum(count for count, _ in works[0].parts)
    assert [work.kind for work in works[1:]] in ([], [SUM])
    assert works[0].multiply_adds < 1.3 * g.multiply_adds + 64**3
