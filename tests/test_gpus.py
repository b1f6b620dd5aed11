"""The GPUs' rates against the peaks that their vendor publishes."""

import pytest
import torch

from bench.measure.gpus import FMA, GPUS, TENSOR
from kernels.runtime import MULTIPROCESSORS

# TFLOP/s of dense products with fp32 accumulators (fp64 for fp64), two FLOP a multiply-add.
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PUBLISHED = {
    # NVIDIA Turing GPU Architecture, table of Tesla T4; FP64 at 1/32 of FP32 (section "Turing TU102 GPU").
    "sm_75": [(TENSOR, FP16, "ieee", 65), (FMA, FP32, "ieee", 8.1), (FMA, FP64, "ieee", 8.1 / 32)],
    # NVIDIA A100 Tensor Core GPU Architecture, table 1.
    "sm_80": [
        (TENSOR, FP16, "ieee", 312), (TENSOR, BF16, "ieee", 312), (TENSOR, FP32, "tf32", 156),
        (TENSOR, FP64, "ieee", 19.5), (FMA, FP32, "ieee", 19.5), (FMA, FP64, "ieee", 9.7),
    ],
    # NVIDIA Ampere GA102 GPU Architecture, table 9: FP16 with FP32 accumulate; FP64 at 1/64 of FP32.
    "sm_86": [
        (TENSOR, FP16, "ieee", 71.2), (TENSOR, BF16, "ieee", 71.2), (TENSOR, FP32, "tf32", 35.6),
        (FMA, FP32, "ieee", 35.6), (FMA, FP64, "ieee", 35.6 / 64),
    ],
    # L4 data sheet, halved where it states the speed with sparsity.
    "sm_89": [
        (TENSOR, FP16, "ieee", 242 / 2), (TENSOR, BF16, "ieee", 242 / 2), (TENSOR, FP32, "tf32", 120 / 2),
        (FMA, FP32, "ieee", 30.3),
    ],
    # NVIDIA H100 Tensor Core GPU Architecture, table 2, H100 SXM5.
    "sm_90": [
        (TENSOR, FP16, "ieee", 989.4), (TENSOR, BF16, "ieee", 989.4), (TENSOR, FP32, "tf32", 494.7),
        (TENSOR, FP64, "ieee", 66.9), (FMA, FP32, "ieee", 66.9), (FMA, FP64, "ieee", 33.5),
    ],
    # NVIDIA HGX B200, eight of them, tensor cores with sparsity: 36 and 18 PFLOP/s, 600 and 296 TFLOP/s. The clocks
    # are what these imply, so this shows no more than that the three dtypes agree on them.
    "sm_100": [
        (TENSOR, FP16, "ieee", 36_000 / 2 / 8), (TENSOR, BF16, "ieee", 36_000 / 2 / 8),
        (TENSOR, FP32, "tf32", 18_000 / 2 / 8), (FMA, FP32, "ieee", 600 / 8), (FMA, FP64, "ieee", 296 / 8),
    ],
    # NVIDIA RTX Blackwell GPU Architecture, appendix A: FP16 with FP32 accumulate; FP64 at 1/64 of FP32.
    "sm_120": [
        (TENSOR, FP16, "ieee", 209.5), (TENSOR, BF16, "ieee", 209.5), (TENSOR, FP32, "tf32", 104.8),
        (FMA, FP32, "ieee", 104.8), (FMA, FP64, "ieee", 1.64),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "unit", "dtype", "precision", "published"),
    [(arch, *row) for arch, rows in PUBLISHED.items() for row in rows],
    ids=str,
)
def test_rates_reproduce_the_published_peaks(arch, unit, dtype, precision, published):
    assert 2 * GPUS[arch].speed(unit, dtype, precision) / 1e12 == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("arch", "published"),
    # GB/s, of the data sheets that bench/measure/gpus.py names; HGX B200's 64 TB/s are of eight.
    [
        ("sm_75", 320), ("sm_80", 2039), ("sm_86", 936), ("sm_89", 300), ("sm_90", 3350), ("sm_100", 64_000 / 8),
        ("sm_120", 1792),
    ],
)  # fmt: skip
def test_bandwidths_are_the_published_ones(arch, published):
    assert GPUS[arch].bandwidth / 1e9 == pytest.approx(published, rel=0.005)


def test_every_architecture_that_is_compiled_for_has_a_gpu():
    assert GPUS.keys() == MULTIPROCESSORS.keys() == PUBLISHED.keys()
    assert all(gpu.source and gpu.arch == arch for arch, gpu in GPUS.items())


def test_what_tensor_cores_cannot_multiply_has_no_rate_on_them():
    t4, h100 = GPUS["sm_75"], GPUS["sm_90"]
    assert t4.rate(TENSOR, BF16) == t4.rate(TENSOR, FP64) == t4.rate(TENSOR, FP32, "tf32") == 0
    assert h100.rate(TENSOR, FP32, "ieee") == 0
    assert h100.rate(TENSOR, BF16) > 0


def test_the_peak_is_the_faster_units():
    """Half precision on tensor cores, IEEE fp32 on FMA units, and a T4's bf16 as fp32."""
    t4 = GPUS["sm_75"]
    assert t4.peak(FP16) == t4.speed(TENSOR, FP16)
    assert t4.peak(BF16) == t4.speed(FMA, FP32) == t4.peak(FP32, "tf32")
    assert GPUS["sm_90"].peak(FP64) == 2 * GPUS["sm_90"].speed(FMA, FP64)


def test_tensor_cores_of_hopper_run_at_a_lower_clock_but_for_fp64():
    h100 = GPUS["sm_90"]
    assert h100.clock_of(TENSOR, FP16) < h100.clock_of(FMA, FP32) == h100.clock_of(TENSOR, FP64)
