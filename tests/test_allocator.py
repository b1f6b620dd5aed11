"""The model of PyTorch's CUDA caching allocator: each rule by hand, all together against a search of every block."""

import json
import os
import random
import subprocess
import sys
import time
from collections import deque
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_allocator import ReferenceAllocator

from bench.measure.allocator import Block, CachingAllocator, OutOfMemory

KIB, MIB = 2**10, 2**20


def layout(allocator: CachingAllocator) -> list[tuple[str, list[int]]]:
    """Each segment's pool and the sizes of its blocks, those of free ones negative."""
    return [
        (segment.pool, [block.size if block.taken else -block.size for block in segment.blocks])
        for segment in allocator.segments
    ]


def figures(allocator: CachingAllocator) -> tuple[int, int, int]:
    return allocator.requested, allocator.allocated, allocator.reserved


def peaks(allocator: CachingAllocator) -> tuple[int, int, int]:
    return allocator.peak_requested, allocator.peak_allocated, allocator.peak_reserved


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (MIB + 1, MIB + 512), (30 * MIB - 511, 30 * MIB)],
)
def test_requests_are_rounded_up_to_512_bytes(nbytes, size):
    allocator = CachingAllocator()
    block = allocator.allocate(nbytes)
    assert (block.requested, block.size) == (nbytes, size)
    assert figures(allocator)[:2] == (nbytes, size)


@pytest.mark.parametrize(
    ("nbytes", "pool", "reserved"),
    [
        pytest.param(1, "small", 2 * MIB, id="the-smallest"),
        pytest.param(MIB, "small", 2 * MIB, id="the-largest-small-one"),
        pytest.param(MIB - 100, "small", 2 * MIB, id="1-MiB-when-rounded"),
        pytest.param(MIB + 1, "large", 20 * MIB, id="the-smallest-large-one"),
        pytest.param(10 * MIB - 512, "large", 20 * MIB, id="the-largest-that-shares-20-MiB"),
        pytest.param(10 * MIB - 1, "large", 10 * MIB, id="10-MiB-when-rounded"),
        pytest.param(10 * MIB + 1, "large", 12 * MIB, id="above-10-MiB-multiples-of-2-MiB"),
        pytest.param(20 * MIB, "large", 20 * MIB, id="20-MiB"),
        pytest.param(101 * MIB, "large", 102 * MIB, id="101-MiB"),
    ],
)
def test_size_and_pool_of_a_new_segment(nbytes, pool, reserved):
    allocator = CachingAllocator()
    allocator.allocate(nbytes)
    (segment,) = allocator.segments
    assert (segment.pool, segment.size, allocator.reserved) == (pool, reserved, reserved)


def test_zero_bytes_take_nothing():
    allocator = CachingAllocator(capacity=0)
    block = allocator.allocate(0)
    assert (block.size, allocator.segments, *figures(allocator), *peaks(allocator)) == (0, [], 0, 0, 0, 0, 0, 0)
    allocator.free(block)
    assert figures(allocator) == (0, 0, 0)


def test_misuse_is_refused():
    allocator = CachingAllocator()
    with pytest.raises(ValueError, match="-1"):
        allocator.allocate(-1)
    for nbytes in (0, 100):
        block = allocator.allocate(nbytes)
        allocator.free(block)
        with pytest.raises(ValueError, match="free already"):
            allocator.free(block)


def test_small_blocks_are_split_down_to_512_bytes():
    allocator = CachingAllocator()
    allocator.allocate(MIB)
    allocator.allocate(MIB - 512)
    assert layout(allocator) == [("small", [MIB, MIB - 512, -512])]
    allocator.allocate(1)
    assert layout(allocator) == [("small", [MIB, MIB - 512, 512])]


def test_large_blocks_are_split_where_more_than_1_mib_is_left():
    allocator = CachingAllocator()
    exactly, more = allocator.allocate(11 * MIB), allocator.allocate(11 * MIB - 512)
    assert layout(allocator) == [("large", [11 * MIB - 512, -MIB - 512]), ("large", [12 * MIB])]
    assert (exactly.requested, exactly.size, more.size) == (11 * MIB, 12 * MIB, 11 * MIB - 512)
    assert allocator.allocated == 23 * MIB - 512


def test_what_a_large_block_has_beyond_the_request_counts_as_allocated_until_it_is_freed():
    allocator = CachingAllocator()
    block = allocator.allocate(11 * MIB)
    assert figures(allocator) == (11 * MIB, 12 * MIB, 12 * MIB)
    allocator.free(block)
    assert figures(allocator) == (0, 0, 12 * MIB)
    allocator.allocate(12 * MIB)
    assert figures(allocator) == (12 * MIB, 12 * MIB, 12 * MIB)


def test_pools_share_nothing():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * MIB))
    allocator.allocate(MIB)
    assert layout(allocator) == [("small", [MIB, -MIB]), ("large", [-20 * MIB])]
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(MIB))
    allocator.allocate(MIB + 1)
    assert layout(allocator) == [("large", [MIB + 512, -(19 * MIB - 512)]), ("small", [-2 * MIB])]


def taken_apart(sizes: list[int]) -> tuple[CachingAllocator, list[Block]]:
    """A full small segment with free blocks of these sizes, in address order, 512 B between them."""
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size) for wanted in sizes for size in (wanted, 512)]
    rest = 2 * MIB - allocator.allocated
    for size in (MIB, rest - MIB):
        allocator.allocate(size)
    for block in blocks[::2]:
        allocator.free(block)
    assert allocator.reserved == 2 * MIB
    return allocator, blocks[::2]


def test_the_smallest_block_that_is_large_enough_is_taken():
    allocator, blocks = taken_apart([4 * KIB, 2 * KIB, 8 * KIB, 1 * KIB])
    assert allocator.allocate(1025).address == blocks[1].address
    assert allocator.allocate(1025).address == blocks[0].address
    assert allocator.allocate(1024).address == blocks[3].address


def test_of_equal_blocks_the_one_of_the_lowest_address_is_taken():
    allocator, blocks = taken_apart([2 * KIB, 2 * KIB, 2 * KIB])
    addresses = sorted(block.address for block in blocks)
    assert [allocator.allocate(2 * KIB).address for _ in blocks] == addresses


def test_of_equal_blocks_in_several_segments_the_one_of_the_lowest_address_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(20 * MIB) for _ in range(3)]
    addresses = sorted(block.address for block in blocks)
    for block in blocks:
        allocator.free(block)
    assert [allocator.allocate(20 * MIB).address for _ in blocks] == addresses


def test_a_block_is_taken_before_a_segment():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(100 * MIB))
    allocator.allocate(3 * MIB)
    assert layout(allocator) == [("large", [3 * MIB, -97 * MIB])]


@pytest.mark.parametrize(
    ("order", "left"),
    [
        pytest.param((0, 1), [-10, 5, 5], id="the-one-before"),
        pytest.param((1, 0), [-10, 5, 5], id="the-one-after"),
        pytest.param((0, 2, 1), [-15, 5], id="both"),
        pytest.param((0, 2), [-5, 5, -5, 5], id="neither"),
        pytest.param((3, 1, 2, 0), [-20], id="all"),
    ],
)
def test_a_freed_block_becomes_one_with_the_free_blocks_beside_it(order, left):
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    for index in order:
        allocator.free(blocks[index])
    assert layout(allocator) == [("large", [size * MIB for size in left])]
    assert allocator.allocate(max(-size for size in left) * MIB).segment is allocator.segments[0]


def test_blocks_of_two_segments_stay_apart_though_they_touch():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(10 * MIB) for _ in range(2)]
    assert blocks[1].address + blocks[1].size == blocks[0].address
    for block in blocks:
        allocator.free(block)
    assert layout(allocator) == [("large", [-10 * MIB]), ("large", [-10 * MIB])]


def test_each_new_segment_lies_below_all_earlier_ones_at_a_multiple_of_2_mib():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(nbytes) for nbytes in (1, 11 * MIB)]
    allocator.free(blocks[1])
    allocator.release()
    blocks += [allocator.allocate(nbytes) for nbytes in (13 * MIB, MIB + 1)]
    kept, released, *later = made = [block.segment for block in blocks]
    assert all(segment.address % (2 * MIB) == 0 for segment in made)
    assert all(new.address + new.size <= old.address for old, new in pairwise(made))
    assert released not in allocator.segments
    assert allocator.segments == [*reversed(later), kept]


def test_freed_memory_stays_reserved_until_it_is_released():
    allocator = CachingAllocator()
    kept, small, large = (allocator.allocate(size) for size in (3 * MIB, 1, 30 * MIB))
    for block in (small, large):
        allocator.free(block)
    assert figures(allocator) == (3 * MIB, 3 * MIB, 52 * MIB)
    allocator.release()
    assert figures(allocator) == (3 * MIB, 3 * MIB, 20 * MIB)
    assert layout(allocator) == [("large", [3 * MIB, -17 * MIB])]
    allocator.allocate(17 * MIB)  # what a segment in use has free is not lost
    assert allocator.reserved == 20 * MIB
    allocator.free(kept)
    allocator.release()
    assert allocator.reserved == 20 * MIB


def test_peaks_are_the_highest_of_each_figure_by_itself():
    allocator = CachingAllocator()
    first = allocator.allocate(12 * MIB)
    allocator.free(first)
    odd = allocator.allocate(11 * MIB)
    assert peaks(allocator) == (12 * MIB, 12 * MIB, 12 * MIB)
    allocator.free(odd)
    allocator.allocate(11 * MIB)
    small = allocator.allocate(1)
    assert peaks(allocator) == (12 * MIB, 12 * MIB + 512, 14 * MIB)
    allocator.free(small)
    allocator.release()
    assert peaks(allocator) == (12 * MIB, 12 * MIB + 512, 14 * MIB)
    allocator.reset_peaks()
    assert peaks(allocator) == figures(allocator) == (11 * MIB, 12 * MIB, 12 * MIB)


def test_a_capacity_is_of_segments_and_may_be_filled():
    allocator = CachingAllocator(capacity=22 * MIB)
    for nbytes in (1, 3 * MIB, 17 * MIB, MIB):
        allocator.allocate(nbytes)
    assert layout(allocator) == [("large", [3 * MIB, 17 * MIB]), ("small", [512, MIB, -(MIB - 512)])]
    with pytest.raises(OutOfMemory, match=f"{2 * MIB} bytes .* {22 * MIB} bytes {22 * MIB} are reserved"):
        allocator.allocate(MIB)
    assert figures(allocator) == (21 * MIB + 1, 21 * MIB + 512, 22 * MIB)
    assert peaks(allocator) == figures(allocator)


def test_a_segment_that_just_fits_releases_nothing():
    allocator = CachingAllocator(capacity=22 * MIB)
    allocator.free(allocator.allocate(1))
    allocator.allocate(20 * MIB)
    assert layout(allocator) == [("large", [20 * MIB]), ("small", [-2 * MIB])]


def test_where_the_capacity_does_not_suffice_free_segments_go_first_all_of_them():
    allocator = CachingAllocator(capacity=64 * MIB)
    kept = allocator.allocate(2 * MIB)
    for block in [allocator.allocate(size) for size in (1, 19 * MIB, 22 * MIB)]:
        allocator.free(block)
    assert allocator.reserved == 64 * MIB
    allocator.allocate(24 * MIB)
    assert layout(allocator) == [("large", [24 * MIB]), ("large", [2 * MIB, -18 * MIB])]
    assert allocator.peak_reserved == 64 * MIB
    allocator.free(kept)
    assert figures(allocator) == (24 * MIB, 24 * MIB, 44 * MIB)


def test_a_request_that_fails_takes_nothing_but_has_released():
    allocator = CachingAllocator(capacity=50 * MIB)
    kept = allocator.allocate(20 * MIB)
    allocator.free(allocator.allocate(20 * MIB))
    with pytest.raises(OutOfMemory):
        allocator.allocate(31 * MIB)
    assert figures(allocator) == (20 * MIB, 20 * MIB, 20 * MIB)
    allocator.free(kept)
    allocator.allocate(31 * MIB)
    assert figures(allocator) == (31 * MIB, 32 * MIB, 32 * MIB)


def test_segments_are_heard_of_as_they_come_and_go():
    heard = []
    allocator = CachingAllocator(
        capacity=24 * MIB,
        on_segment=lambda action, segment: heard.append((action, segment.size, segment.pool, allocator.reserved)),
    )
    for block in [allocator.allocate(size) for size in (12 * MIB, 1)]:
        allocator.free(block)
    allocator.allocate(24 * MIB)
    assert heard == [
        ("segment_alloc", 12 * MIB, "large", 12 * MIB),
        ("segment_alloc", 2 * MIB, "small", 14 * MIB),
        ("segment_free", 12 * MIB, "large", 2 * MIB),
        ("segment_free", 2 * MIB, "small", 0),
        ("segment_alloc", 24 * MIB, "large", 24 * MIB),
    ]


SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 2 * MIB),
    st.integers(1 * MIB, 30 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 9 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 19 * MIB - 512, 19 * MIB]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES),
        st.tuples(st.just("free"), st.integers(0, 10**6)),
        st.just(("release", 0)),
        st.just(("reset", 0)),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, capacity=st.sampled_from([40 * MIB, 100 * MIB, 10**12]))
def test_any_sequence_agrees_with_a_search_through_all_blocks(steps, capacity):
    allocator, reference = CachingAllocator(capacity), ReferenceAllocator(capacity)
    live: list[tuple[Block, list]] = []
    highest = (0, 0, 0)
    for step, number in steps:
        if step == "allocate":
            try:
                expected = reference.allocate(number)
            except OutOfMemory:
                with pytest.raises(OutOfMemory):
                    allocator.allocate(number)
            else:
                live.append((allocator.allocate(number), expected))
        elif step == "free" and live:
            mine, expected = live.pop(number % len(live))
            allocator.free(mine)
            reference.free(expected)
        elif step == "release":
            allocator.release()
            reference.release()
        elif step == "reset":
            allocator.reset_peaks()
            highest = figures(allocator)
        assert layout(allocator) == reference.layout()
        blocks = [block for block, _ in live]
        assert figures(allocator) == (
            sum(block.requested for block in blocks), sum(block.size for block in blocks), reference.reserved(),
        )  # fmt: skip
        highest = tuple(map(max, highest, figures(allocator)))
        # A release on the way to a segment comes before it, so no figure between two steps was higher.
        assert peaks(allocator) == highest
        spans = sorted((block.address, block.address + block.size) for block in blocks)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    for block, _ in live:
        allocator.free(block)
    assert figures(allocator)[:2] == (0, 0)
    assert [sizes for _, sizes in layout(allocator)] == [[-segment.size] for segment in allocator.segments]
    allocator.release()
    assert (figures(allocator), allocator.segments) == ((0, 0, 0), [])


def random_steps(count: int, seed: int, largest: int) -> list[int]:
    """Bytes to allocate, or -1 - i to free the i-th of those that are live."""
    rng, live, steps = random.Random(seed), 0, []
    for _ in range(count):
        if live and rng.random() < 0.48:
            steps.append(-1 - rng.randrange(live))
            live -= 1
        else:
            steps.append(int(2 ** rng.uniform(0, largest)))
            live += 1
    return steps


def replay(steps: list[int], allocator: CachingAllocator) -> list[tuple[int, ...]]:
    """The figures after each step, and the highest reserved so far."""
    live, seen = [], []
    for step in steps:
        if step >= 0:
            live.append(allocator.allocate(step))
        else:
            allocator.free(live.pop(-1 - step))
        seen.append((*figures(allocator), allocator.peak_reserved))
    return seen


def test_ten_thousand_events_take_no_time():
    steps = random_steps(10_000, seed=0, largest=28)
    replay(steps, CachingAllocator())
    start = time.process_time()
    replay(steps, CachingAllocator())
    assert time.process_time() - start < 0.5  # 0.02 s measured; a search through every block takes seconds


ON_THE_GPU = """
import json, sys
import torch

torch.cuda.memory._record_memory_history(context=None, stacks="python")
live, seen = [], []
for step in json.load(sys.stdin):
    if step >= 0:
        live.append(torch.empty(step, dtype=torch.uint8, device="cuda:0"))
    else:
        del live[-1 - step]
    requested = torch.cuda.memory_stats()["requested_bytes.all.current"]
    used = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    seen.append((requested, *used))
events = torch.cuda.memory._snapshot()["device_traces"][0]
segments = [event["addr"] for event in events if event["action"] == "segment_alloc"]
print(json.dumps({"seen": seen, "segments": segments}))
"""


class AsRecorded(CachingAllocator):
    """Puts each new segment where the device did: which of two equal blocks is taken depends on it."""

    def __init__(self, addresses: list[int]) -> None:
        super().__init__()
        self.addresses = deque(addresses)

    def _place(self, total: int) -> int:
        return self.addresses.popleft()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("seed", range(3))
def test_a_gpu_has_the_same_figures_after_each_step(seed):
    steps = random_steps(2000, seed, largest=26)
    # A process of its own: neither blocks that other tests left nor the user's allocator settings.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    run = subprocess.run(
        [sys.executable, "-c", ON_THE_GPU], input=json.dumps(steps), env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    recorded = json.loads(run.stdout)
    allocator = AsRecorded(recorded["segments"])
    assert replay(steps, allocator) == [tuple(seen) for seen in recorded["seen"]]
    assert not allocator.addresses
