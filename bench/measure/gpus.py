"""What the best-known GPU of each generation can do at most, by its vendor's figures.

    gpu = GPUS["sm_80"]
    gpu.rate(TENSOR, torch.float16)       # multiply-adds of one multiprocessor in one cycle
    gpu.peak(torch.float16, "ieee")       # multiply-adds a second of the whole GPU, on its fastest unit

Rates are of dense products with fp32 accumulators (fp64 for fp64). The consumer parts among them (RTX 3090, RTX 5090)
multiply fp16 with fp32 accumulators at half the rate of fp16 accumulators, which no kernel here uses.

Times computed from these are at the boost clock of the data sheet. A card that is clocked higher may be faster; most
are slower, since power holds them down.

Sources: NVIDIA's white papers of the architectures (named beside each GPU) for clocks, units and bandwidth, and for the
multiply-adds of a multiprocessor in a cycle; "CUDA C++ Programming Guide", sections on compute capabilities, for warp
schedulers (4 of one instruction a cycle each) and for the 32 banks of 4 bytes of shared memory.
"""

from dataclasses import dataclass

import torch

from kernels.runtime import MULTIPROCESSORS

GHZ, GB, TB = 1e9, 1e9, 1e12

ISSUED = 4
"""Instructions of warps that a multiprocessor issues in a cycle: one a scheduler."""
SHARED_BYTES = 128
"""Of shared memory that a multiprocessor moves in a cycle: 32 banks of 4 bytes."""

TENSOR, FMA = "tensor cores", "FMA units"
TF32 = "tf32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One product. Rates are multiply-adds of one multiprocessor in one cycle."""

    name: str
    arch: str
    clock: float
    """Boost clock in Hz, of everything but what `tensor_clock` is for."""
    tensor_clock: float
    """Boost clock in Hz while tensor cores multiply fp16, bf16 or TF32; Hopper and Blackwell lower it then."""
    bandwidth: float
    """Bytes a second of DRAM."""
    tensor: dict[torch.dtype | str, int]
    """Rates of the tensor cores by dtype, and TF32; what is absent they cannot multiply."""
    ffma: int
    """fp32 rate of the FMA units."""
    dfma: int
    """fp64 rate of the FMA units."""
    source: str

    @property
    def multiprocessors(self) -> int:
        return MULTIPROCESSORS[self.arch]

    def rate(self, unit: str, dtype: torch.dtype, precision: str = "ieee") -> int:
        """Of TENSOR or FMA units, which multiply fp16 and bf16 as fp32; 0 for what tensor cores cannot multiply."""
        if unit == FMA:
            return self.dfma if dtype == torch.float64 else self.ffma
        if dtype == torch.float32:
            return self.tensor.get(TF32, 0) if precision == "tf32" else 0
        return self.tensor.get(dtype, 0)

    def clock_of(self, unit: str, dtype: torch.dtype) -> float:
        """In Hz, while `unit` (of what `rate` takes) multiplies `dtype`."""
        return self.tensor_clock if unit == TENSOR and dtype != torch.float64 else self.clock

    def speed(self, unit: str, dtype: torch.dtype, precision: str = "ieee") -> float:
        """Multiply-adds a second of all multiprocessors."""
        return self.multiprocessors * self.rate(unit, dtype, precision) * self.clock_of(unit, dtype)

    def peak(self, dtype: torch.dtype, precision: str = "ieee") -> float:
        """`speed` on the faster unit: the flat part of the roofline."""
        return max(self.speed(unit, dtype, precision) for unit in (TENSOR, FMA))


def _halves(rate: int) -> dict[torch.dtype | str, int]:
    return {torch.float16: rate, torch.bfloat16: rate}


GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu(
            name="T4", arch="sm_75", clock=1.59 * GHZ, tensor_clock=1.59 * GHZ, bandwidth=320 * GB,
            tensor={torch.float16: 512}, ffma=64, dfma=2,
            source="NVIDIA Turing GPU Architecture, appendix B, Tesla T4; T4 data sheet for the bandwidth",
        ),
        Gpu(
            # The faster memory of the two: the 40 GB card has 1,555 GB/s, and is otherwise the same.
            name="A100 SXM 80 GB", arch="sm_80", clock=1.41 * GHZ, tensor_clock=1.41 * GHZ, bandwidth=2039 * GB,
            tensor=_halves(1024) | {TF32: 512, torch.float64: 64}, ffma=64, dfma=32,
            source="NVIDIA A100 Tensor Core GPU Architecture, table 1; A100 80GB data sheet for the bandwidth",
        ),
        Gpu(
            name="RTX 3090", arch="sm_86", clock=1.695 * GHZ, tensor_clock=1.695 * GHZ, bandwidth=936 * GB,
            tensor=_halves(256) | {TF32: 128}, ffma=128, dfma=2,
            source="NVIDIA Ampere GA102 GPU Architecture, appendix A",
        ),
        Gpu(
            name="L4", arch="sm_89", clock=2.04 * GHZ, tensor_clock=2.04 * GHZ, bandwidth=300 * GB,
            tensor=_halves(512) | {TF32: 256}, ffma=128, dfma=2,
            source="L4 data sheet; NVIDIA Ada GPU Architecture for the units of a multiprocessor",
        ),
        Gpu(
            # The white paper's own two clocks: tensor cores below fp64 run at the lower one.
            name="H100 SXM", arch="sm_90", clock=1.98 * GHZ, tensor_clock=1.83 * GHZ, bandwidth=3350 * GB,
            tensor=_halves(2048) | {TF32: 1024, torch.float64: 128}, ffma=128, dfma=64,
            source="NVIDIA H100 Tensor Core GPU Architecture, table 3; H100 data sheet for the bandwidth",
        ),
        Gpu(
            # NVIDIA publishes no clocks: these are what its peaks imply at these rates.
            name="B200", arch="sm_100", clock=1.98 * GHZ, tensor_clock=1.86 * GHZ, bandwidth=8 * TB,
            tensor=_halves(4096) | {TF32: 2048, torch.float64: 64}, ffma=128, dfma=64,
            source="NVIDIA HGX B200 data sheet, an eighth of its figures",
        ),
        Gpu(
            name="RTX 5090", arch="sm_120", clock=2.407 * GHZ, tensor_clock=2.407 * GHZ, bandwidth=1792 * GB,
            tensor=_halves(256) | {TF32: 128}, ffma=128, dfma=2,
            source="NVIDIA RTX Blackwell GPU Architecture, appendix A",
        ),
    )
}  # fmt: skip
