"""Reading machine code: listings by hand, and what the compiler made of our kernels."""

import pytest
import torch

from bench.measure.sass import OTHER, Code, Instruction, Loop, innermost, parse, read, usage
from kernels import tiles
from kernels.geometry import ConvGeometry
from kernels.runtime import MULTIPROCESSORS, Target, compile_ahead

LISTING = """
	code for sm_80
		Function : some_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
                                                                     /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.64 R2, [R4.64] ;            /* 0x0000000000000000 */
        /*0020*/              @!P0 BRA 0xa0 ;                        /* 0x0000000000000000 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], [R4.64], P4 ;  /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;             /* 0x0 */
        /*0050*/                   LDSM.16.M88.4 R4, [R7] ;          /* 0x0 */
        /*0060*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ;              /* 0x0 */
        /*0070*/                   IADD3 R3, R3, 0x40, RZ ;          /* 0x0 */
        /*0080*/               @P1 BRA 0x50 ;                        /* 0x0 */
        /*0090*/              @UP2 BRA.U 0x10 ;                      /* 0x0 */
        /*00a0*/                   EXIT ;                            /* 0x0 */
        /*00b0*/                   BRA 0xb0;                         /* 0x0 */
"""


def instruction(opcode: str) -> Instruction:
    (found,) = parse(f"        /*0000*/                   {opcode} R1, R2 ;")
    return found


def test_lines_are_read_with_predicates_and_targets():
    found = parse(LISTING)
    assert [one.address for one in found] == list(range(0, 0xC0, 0x10))
    assert [one.opcode for one in found][:4] == ["MOV", "LDG.E.64", "BRA", "LDGSTS.E.BYPASS.LTC128B.128"]
    assert [one.target for one in found if one.target is not None] == [0xA0, 0x50, 0x10, 0xB0]


def test_the_main_loop_is_the_innermost_one():
    """From 0x50 to 0x80; the outer one from 0x10 on holds it, and the branch to itself at the end is none."""
    (loop,) = innermost(parse(LISTING))
    assert [one.address for one in loop.instructions] == [0x50, 0x60, 0x70, 0x80]
    assert loop.multiply_adds == 16 * 8 * 8
    assert loop.others == 3
    assert loop.overhead == pytest.approx(3000 / 1024)
    assert loop.mix == {"shared load": 1, "multiply-add": 1, OTHER: 1, "control": 1}


@pytest.mark.parametrize(
    ("opcode", "multiply_adds"),
    [
        ("HMMA.16816.F32", 2048), ("HMMA.1688.F32", 1024), ("HMMA.1684.F32.TF32", 512), ("DMMA.884", 256),
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4), ("FFMA", 32), ("FFMA2", 64), ("DFMA", 32), ("IMAD", 0),
        ("UTCHMMA", 0), ("DMMA.8x8x4", 256), ("HFMA2.MMA", 0), ("HMMA.9999", 0),
    ],
)  # fmt: skip
def test_multiply_adds_of_a_warp(opcode, multiply_adds):
    assert instruction(opcode).multiply_adds == multiply_adds


@pytest.mark.parametrize(
    ("opcode", "kind", "width"),
    [
        ("LDG.E.128.SYS", "global load", 16), ("LDG.E.U16", "global load", 2), ("LDG.E", "global load", 4),
        ("LDGSTS.E.BYPASS.LTC128B.128", "asynchronous copy", 16), ("STG.E.64", "global store", 8),
        ("LDL.LU", "spill", 4), ("LDS.128", "shared load", 16), ("UTMALDG.2D", "asynchronous copy", 4),
        ("ISETP.GE.AND", "predicate", 4), ("IMAD.WIDE", OTHER, 4), ("HFMA2.MMA", OTHER, 4),
        ("FFMA2", "multiply-add", 4),
    ],
)  # fmt: skip
def test_kinds_and_widths(opcode, kind, width):
    assert (instruction(opcode).kind, instruction(opcode).bytes_a_thread) == (kind, width)


@pytest.mark.parametrize(
    ("opcode", "read_bytes", "written"),
    [
        ("LDSM.16.M88.4", 512, 0), ("LDSM.16.MT88.2", 256, 0), ("LDSM.16.M88", 128, 0), ("LDS.128", 128, 0),
        ("LDS.U16", 128, 0), ("STS.128", 0, 512), ("STS.U8", 0, 128), ("LDGSTS.E.BYPASS.LTC128B.128", 0, 512),
        ("LDGSTS.E", 0, 128), ("STSM.16.M88.4", 0, 512), ("LDG.E.128", 0, 0), ("LDGDEPBAR", 0, 0), ("UTMALDG.2D", 0, 0),
    ],
)  # fmt: skip
def test_bytes_of_shared_memory_that_a_warp_moves(opcode, read_bytes, written):
    assert (instruction(opcode).shared_reads, instruction(opcode).shared_writes) == (read_bytes, written)


def listing(*lines: str) -> tuple[Instruction, ...]:
    """Instructions at 0x00, 0x10, and so on."""
    return parse("\n".join(f"/*{16 * place:04x}*/ {line} ;" for place, line in enumerate(lines)))


def addresses(loop: Loop) -> list[int]:
    return [one.address for one in loop.instructions]


def test_a_loop_that_only_waits_is_part_of_the_main_loop():
    """As TMA's and sm_100's kernels wait for a barrier within each step; a loop without products is none."""
    found = listing(
        "MOV R1, R2", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA 0x10", "HMMA.16816.F32 R8, R4, R6, R8",
        "@P1 BRA 0x10", "IADD3 R1, R1, R2, RZ", "@P2 BRA 0x50", "EXIT",
    )  # fmt: skip
    (loop,) = innermost(found)
    assert addresses(loop) == [0x10, 0x20, 0x30, 0x40]


def test_the_way_back_from_code_moved_to_the_end_is_no_loop():
    """The slow path of a wait jumps back into the loop's middle: it is not reached through there."""
    found = listing(
        "MOV R1, R2", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA 0x80", "HMMA.16816.F32 R8, R4, R6, R8",
        "@P1 BRA 0x10", "HMMA.16816.F32 R8, R4, R6, R8", "HMMA.16816.F32 R8, R4, R6, R8", "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA 0x80", "BRA 0x30",
    )  # fmt: skip
    (loop,) = innermost(found)
    assert addresses(loop) == [0x10, 0x20, 0x30, 0x40]


def test_a_loop_of_a_called_function_is_one():
    found = listing("CALL.REL.NOINC R2", "EXIT", "FFMA R1, R2, R3, R1", "@P0 BRA 0x20", "RET.REL.NODEC R20")
    (loop,) = innermost(found)
    assert addresses(loop) == [0x20, 0x30]


def test_forward_branches_inside_a_loop_leave_it_whole_and_shorten_its_least_pass():
    """What a branch may jump over is counted as overhead and not in the least; products are never jumped over."""
    found = listing(
        "MOV R1, R2", "@P0 BRA 0x50", *3 * ["IADD3 R1, R1, R2, RZ"], "HMMA.16816.F32 R8, R4, R6, R8",
        "@P2 BRA 0x90", "HMMA.16816.F32 R8, R4, R6, R8", "MOV R3, R4", "@P1 BRA 0x10", "EXIT",
    )  # fmt: skip
    (loop,) = innermost(found)
    assert (len(loop.instructions), loop.others, loop.fewest) == (9, 7, 6)


@pytest.mark.parametrize(
    ("inside", "groups"),
    [
        (("LDGSTS.E.128 [R1], [R2]", "DEPBAR.LE SB0, 0x4", "DEPBAR.LE SB0, 0x2"), 2),
        (("LDGSTS.E.128 [R1], [R2]", "DEPBAR.LE SB0, 0x0"), 0),
        (("LDGSTS.E.128 [R1], [R2]", "WARPGROUP.DEPBAR.LE gsb0, 0x1"), 0),
        (("LDG.E.128 R4, [R2]", "DEPBAR.LE SB0, 0x1"), None),
    ],
    ids=["two-waits", "waits-for-all", "never-waits", "no-copies"],
)
def test_copies_in_flight_are_what_the_strictest_wait_leaves(inside, groups):
    (loop,) = innermost(listing(*inside, "HMMA.16816.F32 R8, R4, R6, R8", "@P0 BRA 0x0", "EXIT"))
    assert loop.copies_in_flight == groups


def test_the_main_loop_is_the_one_that_multiplies_most():
    found = listing(
        "FFMA R1, R2, R3, R1", "@P0 BRA 0x0", "FFMA R1, R2, R3, R1", "FFMA R1, R2, R3, R1", "@P0 BRA 0x20", "EXIT",
    )  # fmt: skip
    code = Code(instructions=found, registers=32, stack_bytes=0, shared_bytes=0)
    assert addresses(code.main_loop) == [0x20, 0x30, 0x40]


def test_unconditional_jumps_and_exits_are_not_fallen_through():
    assert [one.always_leaves for one in listing("BRA 0x0", "@P0 BRA 0x0", "BRA.U UP0, 0x0", "EXIT", "@P0 EXIT")] == [
        True, False, False, True, False,
    ]  # fmt: skip


SHAPES = ((256, 64, 32, 32), (64, 64, 3, 3))


@pytest.mark.parametrize(("arch", "cores"), [("sm_75", False), ("sm_80", True), ("sm_90", True)])
def test_a_pass_of_the_main_loop_multiplies_whole_tiles(arch, cores):
    """The multiply-adds counted are those of the tile, which no machine code says; a pass may be several steps."""
    (kernel, *_) = compile_ahead("forward", *SHAPES, padding=1, dtype=torch.float16, arch=arch)
    geometry = ConvGeometry.of(*SHAPES, (1, 1), (1, 1), (1, 1), 1)
    tile = tiles.candidates("forward", Target(arch, MULTIPROCESSORS[arch]), geometry, torch.float16, "ieee")[0]
    code = read(kernel.asm["cubin"])
    loop = code.main_loop
    steps, rest = divmod(loop.multiply_adds, tile.M * tile.N * tile.K // tile.num_warps)
    assert (steps in (1, 2, 4), rest) == (True, 0)
    assert loop.has_tensor_cores == loop.has_asynchronous_copies == cores
    assert set(loop.global_loads) == {16}
    assert code.spills == code.stack_bytes == 0
    assert 32 < code.registers <= 255


def test_spills_are_seen_and_an_unrolled_loop_is_the_whole_kernel():
    listing = "\n".join(
        f"        /*00{place}0*/                   {opcode} R1, R2 ;"
        for place, opcode in enumerate(("STL", "FFMA", "FFMA", "LDL.LU", "EXIT"))
    )
    code = Code(instructions=parse(listing), registers=255, stack_bytes=4, shared_bytes=0)
    assert code.spills == 2
    assert code.main_loop is None
    assert (code.worked.multiply_adds, code.worked.others) == (64, 3)


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_a_kernel_has_a_stack_where_it_spills(arch, monkeypatch):
    """So the tests that compile for every GPU ask for the stack alone."""
    for size, spills in ((16, False), (128, True)):  # accumulators of a thread: 32, and more than it has registers
        tile = tiles.Tile(M=size, N=64, K=16, num_warps=1, num_stages=1)
        monkeypatch.setattr(tiles, "candidates", lambda *_, tile=tile: (tile,))
        (kernel,) = compile_ahead("forward", *SHAPES, padding=1, dtype=torch.float32, arch=arch)
        asked, code = usage(kernel.asm["cubin"]), read(kernel.asm["cubin"])
        assert (asked.stack_bytes > 0, code.spills > 0) == (spills, spills)
        assert (asked.registers, asked.shared_bytes) == (code.registers, code.shared_bytes)


@pytest.mark.parametrize("reading", [read, usage])
def test_what_is_no_kernel_is_refused(reading):
    with pytest.raises(ValueError, match="no kernel"):
        reading(b"not a cubin")
