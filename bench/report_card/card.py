"""One row of the card: an operation on one layer, compiled for one GPU that is not here, and judged by its code.

    geometry = ConvGeometry.of((256, 64, 32, 32), (64, 64, 3, 3), padding=1)
    found = row("forward", geometry, torch.float16, "ieee", "sm_80")
    found.overhead, found.spills, found.bound_seconds, found.bound_by

Nothing is cached here but machine code that was read: tiles put into kernels/tiles.py a moment ago are compiled.
"""

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from bench.measure import sass
from bench.measure.bound import DRAM, Bound, bound, pass_of, roofline
from bench.measure.gpus import GPUS, Gpu
from bench.measure.occupancy import Occupancy, occupancy, waves
from bench.measure.work import (
    Work,
    compulsory_bytes,
    least_work,
    unfused,
    useful_multiply_adds,
    work_of,
    zero_insertion_multiply_adds,
)
from bench.shapes import Layer, name_of
from kernels.geometry import ConvGeometry
from kernels.runtime import Launch, launches_ahead
from kernels.variants import OPERATIONS as VARIANTS

OPERATIONS = ("forward", "input_grad", "weight_grad")
FUSED = ("forward_relu", "input_grad_masked", "weight_grad_masked")
"""The same of a convolution and the ReLU after it, whose gradients load its result as a mask."""

# What --dtype takes: (dtype, precision).
DTYPES = {
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
    "fp64": (torch.float64, "ieee"),
}

TENSOR_MEMORY = 512
"""Columns of a multiprocessor's tensor memory (PTX ISA, "tcgen05.alloc"), which accumulators of sm_100 share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    """A launch beside the operation's main one: the sum of splits, a copy."""

    kernel: str
    programs: int
    registers: int
    spills: int
    bound_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """All figures of one operation. Plain types, so that it is JSON; None is "unknown"."""

    op: str
    layer: str
    """As "conv3x3-64"."""
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: str
    """One of DTYPES."""
    arch: str
    gpu: str

    kernel: str
    """The main launch's, which multiplies most; the figures below are of it unless they say otherwise."""
    tile: tuple[int, int, int]
    """BLOCK_M, BLOCK_N, BLOCK_K; the depthwise kernels' K is 1."""
    warps: int
    stages: int
    registers: int
    """Of a thread."""
    spills: int
    """Instructions, of all launches."""
    stack_bytes: int
    shared_bytes: int
    """Of a block."""
    occupancy: float
    """Share of a multiprocessor's warps."""
    occupancy_limit: str
    blocks: int
    """On one multiprocessor at once; 0 where the kernel cannot be launched at all."""
    programs: int
    waves: float | None
    last_wave_waste: float | None
    """Share of the last wave's places that stay empty."""

    unrolled: bool
    """Whether the main loop was, so that the whole kernel stands in for it below."""
    mix: dict[str, int]
    """Instructions of the main loop by kind."""
    tensor_core_instructions: int
    multiply_adds_a_pass: float | None
    """Of one warp in one pass of the main loop; of sm_100's tensor cores, the tile's share."""
    from_the_tile: bool
    """Whether the multiply-adds of a pass are the tile's, since sm_100's code does not tell them."""
    others: int
    """Instructions of the main loop that are no multiply-adds."""
    overhead: float | None
    """Others for 1,000 multiply-adds of a warp."""
    others_per_fma: float | None
    """Others for one FFMA or DFMA, where there are no tensor cores."""
    global_loads: dict[int, int]
    """{bytes a thread: instructions} of the main loop."""
    asynchronous: bool
    copies_in_flight: int | None
    """Groups of asynchronous copies that the main loop's waits leave unfinished; None where it has none."""
    tensor_copies: bool
    """Whether the tensor copy engine (TMA) loads in the main loop."""

    multiply_adds: int | None
    """Executed, of all launches; None of a variant's, which nobody here can count."""
    useful_multiply_adds: int
    zero_insertion_multiply_adds: int | None
    """Of an input gradient with a stride: what inserting zeros would have made of it."""
    bytes_requested: int | None
    """Of all launches; None of a variant's."""
    compulsory_bytes: int

    quantisation: float | None
    """How much longer the busiest multiprocessor multiplies than all would at an even spread; None of a variant's."""
    bound_parts: dict[str, float]
    """Seconds of the main launch by what takes them."""
    bound_seconds: float | None
    """Of all launches, one after another; None where the kernel cannot be launched. A variant's is that of useful
    multiply-adds and compulsory bytes, spread evenly: it may do more, and then takes longer."""
    bound_by: str
    roofline_seconds: float
    roofline_by: str
    others_launched: tuple[Other, ...]
    """Triton's launches beside the main one; what PyTorch copies is not among them."""

    @property
    def roofline_share(self) -> float | None:
        """Of the roofline's speed that the bound leaves."""
        return self.roofline_seconds / self.bound_seconds if self.bound_seconds else None

    @property
    def channels(self) -> tuple[int, int]:
        """(Ci, Co) of one group."""
        return self.w_shape[1], self.w_shape[0] // self.groups

    @property
    def counted(self) -> bool:
        """Whether it is known what its kernels execute and ask for, which is so of the lab's own."""
        return self.multiply_adds is not None

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.w_shape[1] == 1


def row(op: str, layer: ConvGeometry | Layer, dtype: torch.dtype, precision: str, arch: str) -> Row:
    """The row of one of OPERATIONS or FUSED, or of a variant, of `layer` on the GPU of `arch`, as "sm_80".

    Raises what `kernels.runtime.launches_ahead` does, ValueError for a variant whose kernel does not tell its tile, and
    KeyError for an architecture of no known GPU.
    """
    gpu = GPUS[arch]
    geometry, name = (layer, None) if isinstance(layer, ConvGeometry) else (layer.geometry, layer.name)
    g = geometry
    options = dict(stride=(g.SH, g.SW), padding=(g.PH, g.PW), dilation=(g.DH, g.DW), groups=g.groups)
    launches = launches_ahead(op, g.x_shape, g.w_shape, **options, dtype=dtype, precision=precision, arch=arch)
    if not launches:
        raise ValueError(f"{op} of {g.x_shape} launches nothing")
    codes = [sass.read(launch.kernel.asm["cubin"]) for launch in launches]
    is_variant = op in VARIANTS
    if is_variant:
        main = max(range(len(launches)), key=lambda index: multiplied_at_once(launches[index], codes[index], dtype))
        require_tile(launches[main])
        works = least_work(op, g, dtype, launches, main)
    else:
        works = work_of(op, g, dtype, launches)
        main = max(range(len(works)), key=lambda index: works[index].multiply_adds)
    bounds = [
        bound(gpu, work, code, warps=warps_of(launch), tile=tile_of(launch), dtype=dtype, precision=precision)
        for launch, work, code in zip(launches, works, codes, strict=True)
    ]
    useful, compulsory = useful_multiply_adds(g), compulsory_bytes(op, g, dtype)
    best = roofline(gpu, useful, compulsory, dtype, precision)
    launch, work, code, slowest = launches[main], works[main], codes[main], bounds[main]
    held = held_by(gpu, launch, code)
    in_waves = waves(blocks=work.programs, held=held, multiprocessors=gpu.multiprocessors) if held.blocks else None
    is_strided = unfused(op) == "input_grad" and max(g.SH, g.SW) > 1
    return Row(
        op=op,
        layer=name or name_of(g.w_shape),
        x_shape=g.x_shape,
        w_shape=g.w_shape,
        **options,
        dtype=dtype_name(dtype, precision),
        arch=arch,
        gpu=gpu.name,
        kernel=launch.kernel.metadata.name,
        **figures_of(launch, code, dtype),
        spills=sum(one.spills for one in codes),
        stack_bytes=max(one.stack_bytes for one in codes),
        occupancy=held.share,
        occupancy_limit=held.limit,
        blocks=held.blocks,
        programs=work.programs,
        waves=in_waves and in_waves.count,
        last_wave_waste=in_waves and in_waves.waste,
        multiply_adds=None if is_variant else sum(one.multiply_adds for one in works),
        useful_multiply_adds=useful,
        zero_insertion_multiply_adds=zero_insertion_multiply_adds(g) if is_strided else None,
        bytes_requested=None if is_variant else sum(one.bytes_requested for one in works),
        compulsory_bytes=compulsory,
        quantisation=None if is_variant else slowest.quantisation,
        bound_parts=slowest.parts,
        bound_seconds=sum(one.seconds for one in bounds) if held.blocks else None,
        bound_by=by_of(bounds, main) if held.blocks else f"does not fit: {held.limit}",
        roofline_seconds=best.seconds,
        roofline_by=best.by,
        others_launched=tuple(
            other(*each)
            for index, each in enumerate(zip(launches, works, codes, bounds, strict=True))
            if index != main
        ),
    )


def figures_of(launch: Launch, code: sass.Code, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of a Row that its main launch's machine code alone tells."""
    loop, warps, tile = code.worked, warps_of(launch), tile_of(launch)
    once = pass_of(loop, warps=warps, tile=tile, itemsize=dtype.itemsize)
    a_pass = once.multiply_adds / warps or None
    fmas = loop.mix.get("multiply-add", 0)
    return dict(
        tile=tile,
        warps=warps,
        stages=launch.kernel.metadata.num_stages,
        registers=code.registers,
        shared_bytes=launch.kernel.metadata.shared,
        unrolled=loop.unrolled,
        mix=loop.mix,
        tensor_core_instructions=loop.count(*sass.TENSOR_CORES),
        multiply_adds_a_pass=a_pass,
        from_the_tile=loop.count("UTCHMMA") > 0,
        others=loop.others,
        overhead=1000 * loop.others / a_pass if a_pass else None,
        others_per_fma=loop.others / fmas if fmas and not loop.has_tensor_cores else None,
        global_loads=loop.global_loads,
        asynchronous=loop.has_asynchronous_copies,
        copies_in_flight=loop.copies_in_flight,
        tensor_copies=loop.has_tensor_copies,
    )


def other(launch: Launch, work: Work, code: sass.Code, least: Bound) -> Other:
    return Other(
        kernel=launch.kernel.metadata.name, programs=work.programs, registers=code.registers, spills=code.spills,
        bound_seconds=least.seconds,
    )  # fmt: skip


def by_of(bounds: list[Bound], main: int) -> str:
    """What bounds the main launch, or DRAM where the others take longer."""
    seconds = bounds[main].seconds
    return bounds[main].by if seconds >= sum(one.seconds for one in bounds) - seconds else DRAM


def held_by(gpu: Gpu, launch: Launch, code: sass.Code) -> Occupancy:
    """The launch's blocks on one multiprocessor."""
    warps = warps_of(launch)
    held = occupancy(gpu.arch, registers=code.registers, warps=warps, shared=launch.kernel.metadata.shared)
    columns = getattr(launch.kernel.metadata, "tmem_size", 0) or 0
    if not columns or TENSOR_MEMORY // columns >= held.blocks:
        return held
    blocks = TENSOR_MEMORY // columns
    return dataclasses.replace(held, blocks=blocks, limit="tensor memory", share=held.share * blocks / held.blocks)


def dtype_name(dtype: torch.dtype, precision: str) -> str:
    """The key of DTYPES; precision concerns float32 alone."""
    kind = dtype, precision if dtype == torch.float32 else "ieee"
    return next(name for name, known in DTYPES.items() if known == kind)


def multiplied_at_once(launch: Launch, code: sass.Code, dtype: torch.dtype) -> int:
    """Multiply-adds of one pass of the main loops of all programs."""
    once = pass_of(code.worked, warps=warps_of(launch), tile=tile_of(launch), itemsize=dtype.itemsize)
    return prod(launch.grid) * once.multiply_adds


def require_tile(launch: Launch) -> None:
    if missing := {"BLOCK_M", "BLOCK_N", "BLOCK_K"} - launch.arguments.keys():
        raise ValueError(
            f"the card reads a kernel's tile from BLOCK_M, BLOCK_N and BLOCK_K, and {launch.kernel.metadata.name} has "
            f"no {min(missing)}"
        )


def warps_of(launch: Launch) -> int:
    return launch.kernel.metadata.num_warps


def tile_of(launch: Launch) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K; what a kernel has not is 1, or for its rows BLOCK."""
    arguments = launch.arguments
    return (
        arguments.get("BLOCK_M", arguments.get("BLOCK", 1)), arguments.get("BLOCK_N", 1), arguments.get("BLOCK_K", 1),
    )  # fmt: skip
