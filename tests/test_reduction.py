"""What a GPU's sums take beside their results, as it was recorded."""

import pytest

from bench.measure.reduction import Buffers, buffers

MIB = 2**20


def on_h100(results: int, terms: int, element: int = 4) -> Buffers:
    return buffers(results, terms, element, multiprocessors=132, threads=2048)


# Recorded on an H100 (132 multiprocessors of 2,048 threads; driver 580.159, PyTorch 2.11, 2026-11-26): sums in float32.
@pytest.mark.parametrize(
    ("results", "terms", "mib"),
    [
        (512, 65_536, 132), (128, 65_536, 64), (256, 262_144, 132), (64, 262_144, 32), (64, 1_048_576, 33),
        (768, 16_384, 96), (192, 16_384, 24),
    ],
)  # fmt: skip
def test_staging_is_what_an_h100_took(results, terms, mib):
    assert on_h100(results, terms).staging == mib * MIB


@pytest.mark.parametrize(
    ("results", "terms"),
    [
        pytest.param(128, 1_000, id="fewer-than-256-terms-a-thread"),
        pytest.param(192, 8, id="fewer-terms-than-a-warp"),
        pytest.param(10, 1, id="one-term"),
        pytest.param(132 * 16 * 128, 1_024, id="results-for-every-block"),
        pytest.param(2**22, 65_536, id="results-for-more-than-every-block"),
    ],
)
def test_sums_that_one_block_adds_take_nothing(results, terms):
    assert on_h100(results, terms) == Buffers(0, 0)


def test_float64_takes_twice_as_much():
    assert on_h100(128, 65_536, 8).staging == 2 * on_h100(128, 65_536).staging


def test_a_larger_gpu_cuts_columns_finer():
    taken = [buffers(512, 65_536, 4, multiprocessors=count, threads=1024).staging for count in (40, 80)]
    assert 0 < taken[0] < taken[1]


def test_a_column_is_cut_so_that_no_thread_adds_more_than_256_terms():
    results, terms = 128 * 1_000, 4_096  # for 132 * 16 blocks, each 32 threads wide and 4 high
    assert on_h100(results, terms).staging == 4 * results * (terms // 4 // 256) * 128


def test_each_block_of_results_has_a_counter():
    assert on_h100(512, 65_536).semaphores == 4 * 512 // 128
