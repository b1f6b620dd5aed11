"""What the model of the caching allocator is held to: the same rules by looking at every block each time."""

from bench.measure.allocator import OutOfMemory

MIB = 2**20


class ReferenceAllocator:
    """A block is [segment, offset, size, requested or None]. Later segments lie lower, so their numbers are lower."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.segments: dict[int, tuple[bool, int]] = {}
        self.blocks: list[list] = []
        self.lowest = 0

    def allocate(self, nbytes: int) -> list:
        size = (nbytes + 511) // 512 * 512
        small = size <= MIB
        fits = [b for b in self.blocks if b[3] is None and self.segments[b[0]][0] == small and b[2] >= size]
        block = min(fits, key=lambda b: (b[2], b[0], b[1])) if fits else self.new(size, small)
        if block[2] - size >= (512 if small else MIB + 512):
            self.blocks.append([block[0], block[1] + size, block[2] - size, None])
            block[2] = size
        block[3] = nbytes
        return block

    def new(self, size: int, small: bool) -> list:
        total = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
        if self.reserved() + total > self.capacity:
            self.release()
        if self.reserved() + total > self.capacity:
            raise OutOfMemory
        self.lowest -= 1
        self.segments[self.lowest] = (small, total)
        self.blocks.append([self.lowest, 0, total, None])
        return self.blocks[-1]

    def free(self, block: list) -> None:
        block[3] = None
        self.blocks.sort()
        merged = [self.blocks[0]]
        for b in self.blocks[1:]:
            last = merged[-1]
            if last[3] is b[3] is None and last[0] == b[0]:
                last[2] += b[2]
            else:
                merged.append(b)
        self.blocks = merged

    def release(self) -> None:
        whole = {b[0] for b in self.blocks if b[3] is None and b[2] == self.segments[b[0]][1]}
        self.blocks = [b for b in self.blocks if b[0] not in whole]
        self.segments = {number: s for number, s in self.segments.items() if number not in whole}

    def reserved(self) -> int:
        return sum(total for _, total in self.segments.values())

    def layout(self) -> list[tuple[str, list[int]]]:
        """Each segment's pool and the sizes of its blocks in address order, those of free ones negative."""
        return [
            ("small" if small else "large",
             [b[2] if b[3] is not None else -b[2] for b in sorted(self.blocks, key=lambda b: b[:2]) if b[0] == number])
            for number, (small, _) in sorted(self.segments.items())
        ]  # fmt: skip
