"""What the compiler made of a kernel: its machine code, the loop that does the work, and what fills that loop.

    code = read(compiled.asm["cubin"])
    code.registers, code.spilled_bytes
    code.main_loop.overhead              # other instructions for 1,000 warp multiply-adds
    code.main_loop.global_loads          # {bytes a thread loads at once: instructions}

A loop is what lies between a backward branch and its target; the main loop is the innermost one with the most
multiply-adds a pass. Where the compiler has unrolled it away, there is none, and the whole kernel stands in.

The disassembler is the one that Triton brings along (cuobjdump), so no GPU and no CUDA toolkit are needed.
Source of the opcodes: NVIDIA, "CUDA Binary Utilities", instruction set references. A warp's multiply-adds by opcode:
HMMA.16816 multiplies 16x8x16, HMMA.1688 16x8x8; HGMMA.MxNxK is done by four warps together; FFMA has one a lane.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

from bench.measure.occupancy import LANES

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

WARPS_OF_A_GROUP = 4
"""Warps that execute one HGMMA together."""

# Kinds of instructions, by the beginning of their opcode; the first that fits counts.
KINDS = {
    "multiply-add": ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "FFMA", "DFMA", "HFMA2"),
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
OTHER = "address and other arithmetic"

_LINE = re.compile(r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);")
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

    @property
    def kind(self) -> str:
        """One of KINDS, or OTHER."""
        return next((kind for kind, names in KINDS.items() if self.opcode.startswith(names)), OTHER)

    @property
    def multiply_adds(self) -> int:
        """Of one warp; 0 for those of sm_100's tensor cores, which do not say how many they make."""
        name, *modifiers = self.opcode.split(".")
        if name == "HMMA":
            m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}.get(modifiers[0], (0, 0, 0))
            return m * n * k
        if name == "DMMA":
            return 8 * 8 * 4
        if name == "HGMMA":
            m, n, k = map(int, modifiers[0].split("x"))
            return m * n * k // WARPS_OF_A_GROUP
        return {"FFMA": LANES, "FFMA2": 2 * LANES, "DFMA": LANES, "HFMA2": 2 * LANES}.get(name, 0)

    @property
    def bytes_a_thread(self) -> int:
        """Of a load or store: 4 unless its modifiers say otherwise."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 4)


@dataclass(frozen=True)
class Loop:
    """Instructions that are executed together, again and again."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def multiply_adds(self) -> int:
        """Of one warp, in one pass."""
        return sum(instruction.multiply_adds for instruction in self.instructions)

    @property
    def others(self) -> int:
        """Instructions that are no multiply-adds."""
        return sum(instruction.kind != "multiply-add" for instruction in self.instructions)

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

    @property
    def has_asynchronous_copies(self) -> bool:
        return any(one.opcode.startswith(("LDGSTS", "UTMALDG", "UBLKCP")) for one in self.instructions)

    @property
    def has_tensor_cores(self) -> bool:
        return any(one.opcode.startswith(("HMMA", "HGMMA", "DMMA", "UTCHMMA")) for one in self.instructions)


@dataclass(frozen=True)
class Code:
    """One kernel's machine code and what it asks of a multiprocessor."""

    instructions: tuple[Instruction, ...]
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread: registers that are spilled, and arrays."""
    shared_bytes: int
    """Of a block, what the compiler itself allots; Triton asks for its own at the launch (`metadata.shared`)."""

    @property
    def spills(self) -> int:
        """Instructions that move registers to local memory or back."""
        return sum(instruction.kind == "spill" for instruction in self.instructions)

    @cached_property
    def main_loop(self) -> Loop | None:
        """None where no loop multiplies."""
        multiplying = [loop for loop in innermost(self.instructions) if "multiply-add" in loop.mix]
        return max(multiplying, key=lambda loop: (loop.multiply_adds, len(loop.instructions)), default=None)

    @property
    def worked(self) -> Loop:
        """The main loop, or where it was unrolled the whole kernel."""
        return self.main_loop or Loop(self.instructions)


def innermost(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """The loops that hold no other one."""
    spans = {(one.target, one.address) for one in instructions if one.target is not None and one.target < one.address}
    inner = [
        (first, last)
        for first, last in spans
        if not any(first <= begin and end <= last and (begin, end) != (first, last) for begin, end in spans)
    ]
    return [
        Loop(tuple(one for one in instructions if first <= one.address <= last)) for first, last in sorted(inner)
    ]


def parse(listing: str) -> tuple[Instruction, ...]:
    """The instructions of one kernel in what `cuobjdump -sass` prints."""
    found = []
    for line in listing.splitlines():
        if match := _LINE.match(line):
            opcode, rest = match["opcode"], match["rest"].strip()
            target = _TARGET.search(rest) if opcode.split(".")[0] == "BRA" else None
            found.append(Instruction(int(match["address"], 16), opcode, rest, int(target[1], 16) if target else None))
    return tuple(found)


def read(cubin: bytes) -> Code:
    """The code of a cubin with one kernel, as Triton's are. Raises ValueError where the disassembler finds none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = _run("-sass", file)
        usage = dict(re.findall(r"\b([A-Z]+):(\d+)", _run("-res-usage", file)))
    instructions = parse(listing)
    if not instructions or "REG" not in usage:
        raise ValueError("cuobjdump finds no kernel in it")
    return Code(
        instructions, registers=int(usage["REG"]), stack_bytes=int(usage["STACK"]), shared_bytes=int(usage["SHARED"])
    )


def _run(flag: str, file: Path) -> str:
    run = subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True)
    return run.stdout + run.stderr
