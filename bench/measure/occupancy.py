"""How much of a GPU a launch fills: blocks that a multiprocessor holds at once, what limits them, and waves.

    held = occupancy("sm_80", registers=128, warps=4, shared=49_152)
    held.blocks, held.limit, held.share
    waves(blocks=1024, held=held, multiprocessors=108).waste

Source of the limits: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", table of technical specifications; of
the rules of rounding, the CUDA Occupancy Calculator.
"""

from dataclasses import dataclass

LANES = 32
"""Threads of a warp."""
REGISTERS = 65_536
"""Of a multiprocessor."""
REGISTER_UNIT = 256
"""Registers are dealt out to a warp in multiples of so many."""
MOST_REGISTERS = 255
"""Of a thread."""
SCHEDULERS = 4
"""Of a multiprocessor; registers are divided among them, and so are warps."""
SHARED_UNIT = {"sm_75": 256}
"""Shared memory is dealt out to a block in multiples of so many bytes; others than these in 128."""
KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one multiprocessor holds."""

    warps: int
    blocks: int
    shared: int
    """Bytes of shared memory."""
    kept: int
    """Bytes of it that the system takes for each block."""


LIMITS = {
    "sm_75": Limits(warps=32, blocks=16, shared=64 * KIB, kept=0),
    "sm_80": Limits(warps=64, blocks=32, shared=164 * KIB, kept=KIB),
    "sm_86": Limits(warps=48, blocks=16, shared=100 * KIB, kept=KIB),
    "sm_89": Limits(warps=48, blocks=24, shared=100 * KIB, kept=KIB),
    "sm_90": Limits(warps=64, blocks=32, shared=228 * KIB, kept=KIB),
    "sm_100": Limits(warps=64, blocks=32, shared=228 * KIB, kept=KIB),
    "sm_120": Limits(warps=48, blocks=24, shared=100 * KIB, kept=KIB),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """Blocks on one multiprocessor."""

    blocks: int
    """At once; 0 where not even one fits."""
    limit: str
    """What stands in the way of one more: "registers", "shared memory", "warps" or "blocks"."""
    share: float
    """Of the warps that the multiprocessor could hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waves:
    """A grid on all multiprocessors."""

    count: float
    """How often the GPU is filled; 0.5 fills half of it once."""
    waste: float
    """Share of the last wave's places that stay empty."""


def occupancy(arch: str, *, registers: int, warps: int, shared: int) -> Occupancy:
    """For blocks of so many warps with `registers` a thread and `shared` bytes; ValueError for an unknown `arch`."""
    if arch not in LIMITS:
        raise ValueError(f"unknown GPU architecture {arch!r}; known: {', '.join(LIMITS)}")
    limits = LIMITS[arch]
    fit = {"warps": limits.warps // warps, "blocks": limits.blocks}
    of_a_warp = _up(registers * LANES, REGISTER_UNIT)
    warps_with_registers = REGISTERS // SCHEDULERS // of_a_warp * SCHEDULERS if of_a_warp else limits.warps
    fit["registers"] = 0 if registers > MOST_REGISTERS else warps_with_registers // warps
    of_a_block = _up(shared + limits.kept, SHARED_UNIT.get(arch, 128))
    fit["shared memory"] = limits.shared // of_a_block if of_a_block else limits.blocks
    limit = min(fit, key=fit.__getitem__)
    return Occupancy(blocks=fit[limit], limit=limit, share=fit[limit] * warps / limits.warps)


def waves(*, blocks: int, held: Occupancy, multiprocessors: int) -> Waves:
    """Of a grid of so many blocks. Raises ValueError where a multiprocessor holds none."""
    places = held.blocks * multiprocessors
    if places == 0:
        raise ValueError(f"not one block fits on a multiprocessor: too much of {held.limit}")
    last = blocks % places or places
    return Waves(count=blocks / places, waste=1 - last / places)


def _up(number: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `number`."""
    return -(-number // unit) * unit
