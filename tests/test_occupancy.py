"""Occupancy by hand, by NVIDIA's rules."""

import pytest

from bench.measure.occupancy import KIB, LIMITS, occupancy, waves
from kernels.runtime import MULTIPROCESSORS


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "blocks", "limit"),
    [
        pytest.param("sm_80", 32, 4, 0, 16, "warps", id="64-warps-in-blocks-of-4"),
        pytest.param("sm_80", 128, 4, 0, 4, "registers", id="65536-registers-by-128-for-128-threads"),
        pytest.param("sm_80", 73, 4, 0, 6, "registers", id="73-registers-are-rounded-up-to-80"),
        pytest.param("sm_80", 255, 8, 0, 1, "registers", id="two-warps-of-255-to-a-scheduler"),
        pytest.param("sm_80", 64, 4, 48 * 1024, 3, "shared memory", id="a-kib-more-for-the-system"),
        pytest.param("sm_80", 32, 1, 0, 32, "blocks", id="32-blocks-at-most"),
        pytest.param("sm_75", 64, 4, 32 * 1024, 2, "shared memory", id="turing-takes-nothing-for-the-system"),
        pytest.param("sm_75", 32, 4, 0, 8, "warps", id="turing-has-half-the-warps"),
        pytest.param("sm_86", 40, 4, 0, 12, "warps", id="48-warps"),
        pytest.param("sm_90", 168, 4, 100 * 1024, 2, "shared memory", id="228-kib-on-hopper"),
        pytest.param("sm_90", 32, 4, 228 * 1024, 0, "shared memory", id="more-than-there-is"),
        pytest.param("sm_80", 256, 4, 0, 0, "registers", id="more-registers-than-a-thread-has"),
    ],
)
def test_blocks_on_a_multiprocessor(arch, registers, warps, shared, blocks, limit):
    held = occupancy(arch, registers=registers, warps=warps, shared=shared)
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.share == pytest.approx(blocks * warps / LIMITS[arch].warps)


def test_waves_and_what_the_last_one_wastes():
    held = occupancy("sm_80", registers=128, warps=4, shared=0)  # 4 blocks on each of 108
    full, half, over = (waves(blocks=count, held=held, multiprocessors=108) for count in (864, 216, 433))
    assert (full.count, full.waste) == (2.0, 0.0)
    assert (half.count, half.waste) == (0.5, 0.5)
    assert over.waste == pytest.approx(431 / 432)


def test_impossible_launches_are_refused():
    with pytest.raises(ValueError, match="too much of shared memory"):
        waves(blocks=1, held=occupancy("sm_75", registers=32, warps=4, shared=65_537), multiprocessors=40)
    with pytest.raises(ValueError, match="unknown GPU architecture 'sm_42'; known: sm_75"):
        occupancy("sm_42", registers=32, warps=4, shared=0)


def test_every_architecture_that_is_compiled_for_has_limits():
    assert LIMITS.keys() == MULTIPROCESSORS.keys()
    assert all(64 * KIB <= limits.shared <= 228 * KIB for limits in LIMITS.values())
