"""What PyTorch's CUDA caching allocator takes from the device for a sequence of allocations and frees.

    allocator = CachingAllocator(capacity=80 * 2**30)
    block = allocator.allocate(nbytes)
    allocator.free(block)
    allocator.allocated, allocator.peak_reserved    # memory_allocated(), max_memory_reserved() of torch.cuda

A model of c10/cuda/CUDACachingAllocator.cpp with default settings and one stream; its functions in brackets:

- A request is rounded up to a multiple of 512 B [round_size]. Up to 1 MiB rounded it belongs to the small pool, above
  to the large pool [get_pool]; pools share nothing.
- It gets the smallest free block of its pool that is large enough, of equal ones the one of the lowest address
  [get_free_block].
- If there is none, the device gives a new segment [get_allocation_size]: 2 MiB in the small pool; in the large pool
  20 MiB for less than 10 MiB, otherwise the request rounded up to a multiple of 2 MiB.
- What the block has beyond the request becomes a free block of its own if it is at least 512 B in the small pool, more
  than 1 MiB in the large pool [should_split]; otherwise it stays with the request and counts as allocated.
- A freed block becomes one with the free blocks beside it in its segment [free_block]. Segments are kept.
- If a new segment does not fit in the capacity, every segment that is free as a whole goes back to the device, of both
  pools, needed or not, and it is tried once more [release_cached_blocks].

Not modelled: `max_split_size_mb`, `roundup_power2_divisions`, `garbage_collection_threshold` and `expandable_segments`,
all off by default; pools of CUDA graphs; memory used on a second stream, whose free is delayed; what others than this
allocator take of the device.

Assumed: each new segment lies below all earlier ones, where cudaMalloc may put it anywhere. It decides only between
free blocks of exactly equal size, of which a step has many: with driver 580 on an H100 it gave each segment of five
recorded training steps its size, and the opposite did not.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

# Bytes, with their names in c10/core/AllocatorConfig.h.
UNIT = 512
"""kMinBlockSize"""
SMALL_LIMIT = 2**20
"""kSmallSize: the largest request of the small pool."""
SMALL_SEGMENT = 2 * 2**20
"""kSmallBuffer"""
LARGE_SEGMENT = 20 * 2**20
"""large_segment_size; kLargeBuffer before it could be set."""
OWN_SEGMENT = 10 * 2**20
"""kMinLargeAlloc: the smallest request whose segment is made to its size."""
OWN_SEGMENT_UNIT = 2 * 2**20
"""kRoundLarge"""

HIGHEST_ADDRESS = 0x7F00_0000_0000
"""Above the first segment; of the height that CUDA's addresses have under Linux."""


class OutOfMemory(Exception):
    """A segment does not fit in the capacity, even with every free segment given back."""


@dataclass(frozen=True, slots=True)
class Request:
    """Something is `nbytes` bytes from here on: made, resized, or freed."""

    key: Hashable
    """Tells things apart; one that was freed may be used again."""
    nbytes: int
    """0 for one that is freed."""
    label: tuple[str, ...] = ()
    """What it is, the narrowest name first, as a call stack has its innermost frame first. Not needed for a free."""


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment, taken or free. One that is taken is given back by `CachingAllocator.free`, once."""

    address: int
    size: int
    """Bytes that count as allocated while it is taken."""
    segment: "Segment | None"
    """None for a request of 0 bytes, which takes nothing."""
    requested: int = 0
    """Bytes that were asked for; 0 while it is free."""
    taken: bool = False
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)
    """The neighbours in its segment."""


@dataclass(slots=True, eq=False)
class Segment:
    """What one cudaMalloc gave."""

    address: int
    size: int
    """Bytes."""
    pool: Literal["small", "large"]
    first: Block = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.first = Block(self.address, self.size, self)

    @property
    def blocks(self) -> list[Block]:
        """In address order; together they fill the segment."""
        blocks, block = [], self.first
        while block is not None:
            blocks.append(block)
            block = block.after
        return blocks


class CachingAllocator:
    """Follows the allocations and frees of one stream; see the module's docstring.

    `capacity` is what all segments together may take, in bytes; None sets no limit. `on_segment` hears of each segment
    that comes ("segment_alloc") and goes ("segment_free"), by the names that PyTorch's memory history has for it.

    All in bytes: `requested` is what callers asked for, `allocated` the sizes of their blocks, `reserved` the sizes of
    the segments; each is as the figure of torch.cuda.memory_stats() of that name. `peak_requested`, `peak_allocated`
    and `peak_reserved` are the highest since the beginning or the last `reset_peaks`, each by itself.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        on_segment: Callable[[Literal["segment_alloc", "segment_free"], Segment], None] | None = None,
    ) -> None:
        self.capacity = capacity
        self.requested = self.allocated = self.reserved = 0
        self.reset_peaks()
        self._on_segment = on_segment
        self._segments: dict[int, Segment] = {}
        self._served: dict[Hashable, Block] = {}
        self._lowest = HIGHEST_ADDRESS
        # Of each pool, sorted; no two blocks share an address, so blocks themselves are never compared.
        self._free: dict[str, list[tuple[int, int, Block]]] = {"small": [], "large": []}

    @property
    def segments(self) -> list[Segment]:
        """In address order."""
        return [self._segments[address] for address in sorted(self._segments)]

    def serve(self, request: Request) -> None:
        """Takes, resizes or gives back what the request is about. Raises as `allocate`.

        Resized, the new block is taken while the old one is there, for as long as the one is copied into the other
        (resize_bytes_cuda in ATen/native/cuda/Resize.cpp).
        """
        old = self._served.get(request.key)
        if request.nbytes == (old.requested if old else 0):
            return
        if request.nbytes:
            self._served[request.key] = self.allocate(request.nbytes)
        else:
            del self._served[request.key]
        if old:
            self.free(old)

    def allocate(self, nbytes: int) -> Block:
        """Takes a block for `nbytes`. Raises OutOfMemory, and ValueError for a negative size."""
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        if nbytes == 0:
            return Block(0, 0, None, taken=True)
        size = -(-nbytes // UNIT) * UNIT
        pool = "small" if size <= SMALL_LIMIT else "large"
        free = self._free[pool]
        at = bisect_left(free, (size,))
        block = free.pop(at)[2] if at < len(free) else self._new_segment(size, pool).first
        rest = block.size - size
        if rest > SMALL_LIMIT if pool == "large" else rest >= UNIT:
            self._split(block, size)
        block.requested, block.taken = nbytes, True
        self.requested += nbytes
        self.allocated += block.size
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Gives a block back. Raises ValueError for one that is free already."""
        if not block.taken:
            raise ValueError(f"the block at {block.address:#x} is free already")
        block.taken = False
        if block.segment is None:
            return
        self.requested -= block.requested
        self.allocated -= block.size
        block.requested = 0
        if block.after is not None and not block.after.taken:
            self._unlist(block.after)
            self._join(block)
        if block.before is not None and not block.before.taken:
            block = block.before
            self._unlist(block)
            self._join(block)
        insort(self._free[block.segment.pool], (block.size, block.address, block))

    def release(self) -> None:
        """Gives every segment without a taken block back to the device, as torch.cuda.empty_cache()."""
        for pool in ("large", "small"):
            kept = []
            for entry in self._free[pool]:
                block = entry[2]
                if block.size < block.segment.size:
                    kept.append(entry)
                    continue
                del self._segments[block.address]
                self.reserved -= block.size
                if self._on_segment is not None:
                    self._on_segment("segment_free", block.segment)
            self._free[pool] = kept

    def reset_peaks(self) -> None:
        """Begins new peaks at what is taken now."""
        self.peak_requested, self.peak_allocated, self.peak_reserved = self.requested, self.allocated, self.reserved

    def _new_segment(self, size: int, pool: Literal["small", "large"]) -> Segment:
        """A segment for a block of `size`, not in the list of free blocks."""
        if pool == "small":
            total = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            total = LARGE_SEGMENT
        else:
            total = -(-size // OWN_SEGMENT_UNIT) * OWN_SEGMENT_UNIT
        if self.capacity is not None and self.reserved + total > self.capacity:
            self.release()
            if self.reserved + total > self.capacity:
                raise OutOfMemory(
                    f"a segment of {total} bytes does not fit: of {self.capacity} bytes {self.reserved} are reserved, "
                    f"{self.allocated} of them allocated"
                )
        address = self._place(total)
        segment = self._segments[address] = Segment(address, total, pool)
        self.reserved += total
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        if self._on_segment is not None:
            self._on_segment("segment_alloc", segment)
        return segment

    def _place(self, total: int) -> int:
        """The address of a new segment. Sizes are multiples of 2 MiB, so addresses are too, as cudaMalloc's."""
        self._lowest -= total
        return self._lowest

    def _split(self, block: Block, size: int) -> None:
        """Cuts the block to `size`; the rest becomes a free block after it."""
        rest = Block(block.address + size, block.size - size, block.segment, before=block, after=block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        insort(self._free[block.segment.pool], (rest.size, rest.address, rest))

    def _unlist(self, block: Block) -> None:
        free = self._free[block.segment.pool]
        del free[bisect_left(free, (block.size, block.address))]

    @staticmethod
    def _join(block: Block) -> None:
        """Makes the block one with the one after it."""
        gone = block.after
        block.size += gone.size
        block.after = gone.after
        if block.after is not None:
            block.after.before = block
