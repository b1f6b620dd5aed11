"""What the compiler made of a kernel: its machine code, the loop that does the work, and what fills that loop.

    code = read(compiled.asm["cubin"])
    code.registers, code.spills, code.stack_bytes
    code.main_loop.overhead              # other instructions for 1,000 warp multiply-adds
    code.main_loop.global_loads          # {bytes a thread loads at once: instructions}

A loop is what lies between a backward branch and its target; the main loop is, of those that multiply and hold no
other that does, the one with the most multiply-adds a pass. A loop inside that only waits for a copy is part of it,
once. Where the compiler has unrolled it away, there is none, and the whole kernel stands in.

The disassembler is the one that Triton brings along (cuobjdump), so no GPU and no CUDA toolkit are needed.
Source of the opcodes: NVIDIA, "CUDA Binary Utilities", instruction set references. A warp's multiply-adds by opcode:
HMMA.16816 multiplies 16x8x16, HMMA.1688 16x8x8; HGMMA.MxNxK is done by four warps together; FFMA has one a lane, and
FFMA2 (sm_100 and later) two. HFMA2 is none: kernels that accumulate in fp32 have it only to put a constant into a
register, without which nothing is multiplied (HFMA2.MMA R1, -RZ, RZ, 0, 0).
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path

import triton

from bench.measure.occupancy import LANES

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

WARPS_OF_A_GROUP = 4
"""Warps that execute one HGMMA together."""

# (m, n, k) of a matrix instruction by its first modifier; the generations write them in two ways.
SHAPES = {
    "16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4),
    "16x8x16": (16, 8, 16), "16x8x8": (16, 8, 8), "16x8x4": (16, 8, 4), "8x8x4": (8, 8, 4),
}  # fmt: skip

BYTES_OF_K = 32
"""Of an operand that HGMMA and UTCHMMA take at once along the reduction, whatever the dtype."""

WAVEFRONT = 128
"""Bytes of shared memory that one cycle serves, and so the least that a load of a warp costs."""

# Kinds of instructions, by the beginning of their opcode; the first that fits counts.
KINDS = {
    "multiply-add": ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "FFMA", "DFMA"),
    "asynchronous copy": ("LDGSTS", "UTMALDG", "UBLKCP", "LDGDEPBAR", "DEPBAR", "UTMACMDFLUSH"),
    "global load": ("LDG",),
    "global store": ("STG", "RED", "ATOM"),
    "shared load": ("LDSM", "LDS"),
    "shared store": ("STS", "STSM"),
    "spill": ("LDL", "STL"),
    "barrier": ("BAR", "SYNCS", "WARPSYNC", "MEMBAR", "FENCE", "WARPGROUP", "ARRIVES"),
    "control": ("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "NOP"),
    "predicate": ("ISETP", "UISETP", "PLOP3", "FSETP", "UPLOP3", "R2P", "P2R"),
}
TENSOR_CORES = ("HMMA", "HGMMA", "DMMA", "UTCHMMA")
OTHER = "address and other arithmetic"

_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of machine code."""

    address: int
    """In bytes from the kernel's beginning."""
    opcode: str
    """With its modifiers, as "HMMA.16816.F32"."""
    operands: str
    target: int | None
    """Of a branch, the address it goes to."""
    predicated: bool = False
    """Whether it may not be executed although it is reached."""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def always_leaves(self) -> bool:
        """Whether what comes after it in memory is never what is executed next."""
        if self.name == "BRA":
            return not self.predicated and self.operands.startswith("0x")
        return self.name in ("EXIT", "RET") and not self.predicated

    @property
    def kind(self) -> str:
        """One of KINDS, or OTHER."""
        return next((kind for kind, names in KINDS.items() if self.opcode.startswith(names)), OTHER)

    @property
    def multiply_adds(self) -> int:
        """Of one warp; 0 for those of sm_100's tensor cores, which do not say how many they make."""
        name, *modifiers = self.opcode.split(".")
        if name in ("HMMA", "DMMA"):
            return prod(SHAPES.get(modifiers[0], (0,)))
        if name == "HGMMA":
            return prod(map(int, modifiers[0].split("x"))) // WARPS_OF_A_GROUP
        return {"FFMA": LANES, "FFMA2": 2 * LANES, "DFMA": LANES}.get(name, 0)

    @property
    def bytes_a_thread(self) -> int:
        """Of a load or store: 4 unless its modifiers say otherwise."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 4)

    @property
    def shared_writes(self) -> int:
        """Bytes that a warp writes to shared memory; the tensor copy engine's are not known."""
        if self.name in ("STS", "LDGSTS"):
            return max(WAVEFRONT, LANES * self.bytes_a_thread)
        return _matrices(self.opcode) if self.name == "STSM" else 0

    @property
    def shared_reads(self) -> int:
        """Bytes that a warp reads from shared memory, or a tensor core for it; UTCHMMA's are not known.

        Of a plain load the least: lanes that read the same word are served together, and machine code does not tell.
        """
        if self.name == "LDS":
            return WAVEFRONT
        if self.name == "LDSM":
            return _matrices(self.opcode)
        if self.name == "HGMMA":
            m, n, _ = map(int, self.opcode.split(".")[1].split("x"))
            # Destination first, then the left operand: in registers, or in shared memory with the right one.
            is_left_shared = self.operands.split(",")[1].strip().startswith("gdesc")
            return (n + m * is_left_shared) * BYTES_OF_K // WARPS_OF_A_GROUP
        return 0


def _matrices(opcode: str) -> int:
    """Bytes of an LDSM or STSM: 8x8 elements of two bytes, once, twice or four times."""
    count = opcode.rpartition(".")[2]
    return 128 * (int(count) if count in ("2", "4") else 1)


@dataclass(frozen=True)
class Loop:
    """Instructions that are executed together, again and again."""

    instructions: tuple[Instruction, ...]
    unrolled: bool = False
    """Whether this is a whole kernel instead, executed once."""

    @cached_property
    def multiply_adds(self) -> int:
        """Of one warp, in one pass."""
        return sum(instruction.multiply_adds for instruction in self.instructions)

    @property
    def others(self) -> int:
        """Instructions that are no multiply-adds."""
        return sum(instruction.kind != "multiply-add" for instruction in self.instructions)

    @cached_property
    def fewest(self) -> int:
        """Instructions that a pass executes at least: through all multiply-adds, jumping over what a branch may."""
        last = max((i for i, one in enumerate(self.instructions) if one.kind == "multiply-add"), default=0)
        end = last if self.unrolled else len(self.instructions) - 1
        place = {one.address: i for i, one in enumerate(self.instructions)}
        least = [0] + [len(self.instructions)] * end
        for i, one in enumerate(self.instructions[:end]):
            if not one.always_leaves:
                least[i + 1] = min(least[i + 1], least[i] + 1)
            to = place.get(one.target, 0)
            if i < to <= end and not any(other.kind == "multiply-add" for other in self.instructions[i:to]):
                least[to] = min(least[to], least[i] + 1)
        return least[end] + 1

    @property
    def overhead(self) -> float | None:
        """Other instructions for 1,000 warp multiply-adds; None where those are not known."""
        return 1000 * self.others / self.multiply_adds if self.multiply_adds else None

    @property
    def mix(self) -> dict[str, int]:
        """Instructions by kind, most first."""
        return dict(Counter(instruction.kind for instruction in self.instructions).most_common())

    @property
    def global_loads(self) -> dict[int, int]:
        """{bytes a thread: instructions}, copies to shared memory among them; the tensor copy engine's are not."""
        loads = [one for one in self.instructions if one.opcode.startswith("LDG") and one.opcode != "LDGDEPBAR"]
        return dict(Counter(one.bytes_a_thread for one in loads))

    def count(self, *names: str) -> int:
        """Instructions whose opcode begins so."""
        return sum(one.opcode.startswith(names) for one in self.instructions)

    @property
    def has_tensor_copies(self) -> bool:
        """Whether the tensor copy engine (TMA) loads."""
        return self.count("UTMALDG", "UBLKCP") > 0

    @property
    def has_asynchronous_copies(self) -> bool:
        return self.has_tensor_copies or self.count("LDGSTS") > 0

    @property
    def copies_in_flight(self) -> int | None:
        """Groups of asynchronous copies that may be unfinished where fewest are: what the loop's waits let pass.

        None where it has none (LDGSTS); the tensor copy engine's are awaited by barriers, and not counted.
        """
        if not self.count("LDGSTS"):
            return None
        waits = [one for one in self.instructions if one.opcode == "DEPBAR.LE" and one.operands.startswith("SB0")]
        return min((int(one.operands.split(",")[1], 16) for one in waits), default=0)

    @property
    def has_tensor_cores(self) -> bool:
        return self.count(*TENSOR_CORES) > 0


@dataclass(frozen=True)
class Usage:
    """What a kernel asks of a multiprocessor."""

    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread: registers that are spilled, and arrays. Without it nothing spills."""
    shared_bytes: int
    """Of a block, what the compiler itself allots; Triton asks for its own at the launch (`metadata.shared`)."""


@dataclass(frozen=True)
class Code(Usage):
    """One kernel's machine code, and what it asks of a multiprocessor."""

    instructions: tuple[Instruction, ...]

    @property
    def spills(self) -> int:
        """Instructions that move registers to local memory or back."""
        return sum(instruction.kind == "spill" for instruction in self.instructions)

    @cached_property
    def main_loop(self) -> Loop | None:
        """None where no loop multiplies."""
        found = innermost(self.instructions)
        return max(found, key=lambda loop: (loop.multiply_adds, len(loop.instructions)), default=None)

    @property
    def worked(self) -> Loop:
        """The main loop, or where it was unrolled the whole kernel."""
        return self.main_loop or Loop(self.instructions, unrolled=True)


def innermost(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """The loops that multiply and hold no other that does."""
    spans = {
        (one.target, one.address): Loop(tuple(i for i in instructions if one.target <= i.address <= one.address))
        for one in instructions
        if one.target is not None and one.target < one.address and _is_loop(instructions, one)
    }
    working = {span: loop for span, loop in sorted(spans.items()) if "multiply-add" in loop.mix}
    return [
        loop
        for (first, last), loop in working.items()
        if not any(first <= begin and end <= last and (begin, end) != (first, last) for begin, end in working)
    ]


def _is_loop(instructions: tuple[Instruction, ...], branch: Instruction) -> bool:
    """Whether a backward branch closes a loop: it is reached through its target alone.

    Others lead back from code that was moved to the kernel's end, such as the slow path of waiting for a barrier.
    """
    place = {one.address: i for i, one in enumerate(instructions)}

    def reaches(avoided: int | None) -> bool:
        seen, pending = set(), [0]
        while pending:
            i = pending.pop()
            if i in seen or i >= len(instructions) or instructions[i].address == avoided:
                continue
            seen.add(i)
            if instructions[i] is branch:
                return True
            if not instructions[i].always_leaves:
                pending.append(i + 1)
            if instructions[i].target in place:
                pending.append(place[instructions[i].target])
        return False

    # What is not reached at all is called, by an instruction whose target is not read.
    return not reaches(branch.target) or not reaches(None)


def parse(listing: str) -> tuple[Instruction, ...]:
    """The instructions of one kernel in what `cuobjdump -sass` prints."""
    found = []
    for line in listing.splitlines():
        if match := _LINE.match(line):
            opcode, rest = match["opcode"], match["rest"].strip()
            target = _TARGET.search(rest) if opcode.split(".")[0] == "BRA" else None
            leads_to = int(target[1], 16) if target else None
            found.append(Instruction(int(match["address"], 16), opcode, rest, leads_to, bool(match["predicate"])))
    return tuple(found)


@lru_cache(maxsize=64)  # layers share their second passes, and whole kernels
def read(cubin: bytes) -> Code:
    """The code of a cubin with one kernel, as Triton's are. Raises ValueError where the disassembler finds none."""
    asked, instructions = usage(cubin), parse(_told("-sass", cubin))
    if not instructions:
        raise ValueError("cuobjdump finds no kernel in it")
    return Code(**vars(asked), instructions=instructions)


def usage(cubin: bytes) -> Usage:
    """What the kernel of a cubin asks for, without disassembling it. Raises ValueError where there is none."""
    told = dict(re.findall(r"\b([A-Z]+):(\d+)", _told("-res-usage", cubin)))
    if "REG" not in told:
        raise ValueError("cuobjdump finds no kernel in it")
    return Usage(registers=int(told["REG"]), stack_bytes=int(told["STACK"]), shared_bytes=int(told["SHARED"]))


def _told(flag: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        run = subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True)
    return run.stdout + run.stderr
