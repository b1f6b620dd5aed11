"""A predicted memory history in the form of torch.cuda.memory._snapshot(), for PyTorch's viewer of such histories.

    requests = [
        Request(0, 9408 * 4, ("conv1.weight", "parameters")),
        Request(1, 2**30, ("aten.im2col", "conv1", "saved for backward")),
        Request(1, 0),
    ]
    with open("step.pickle", "wb") as file:
        write(file, snapshot(requests, title="resnet18, batch 128"))

The file, dragged into https://pytorch.org/memory_viz, opens as the "Active Memory Timeline": every storage is a band
as high as its bytes, and pointing at one shows its label, where a recorded history has the call stack. "Allocator
State History" shows the segments that the allocator would hold, and the gaps in them.

Requests are replayed through CachingAllocator. Nothing is recorded by a GPU, and every event says so. The viewer's
times are positions in the sequence of requests, not times.
"""

import pickle
from collections.abc import Hashable, Iterable
from typing import BinaryIO

from bench.measure.allocator import Block, CachingAllocator, Request, Segment

PREDICTED = "predicted, not recorded by a GPU"


def snapshot(requests: Iterable[Request], *, title: str) -> dict:
    """The history of `requests` and what is left after the last, as torch.cuda.memory._snapshot() gives them.

    `title` is the outermost frame of everything.
    """
    replay = _Replay(title)
    for request in requests:
        replay.serve(request)
    return replay.snapshot()


def write(file: BinaryIO, snapshot: dict) -> None:
    """Writes what the viewer opens."""
    # Protocol 4 is the newest that the viewer reads; later Pythons than 3.13 would write 5.
    pickle.dump(snapshot, file, protocol=4)


class _Replay:
    """A snapshot in the making. Keys and names of actions are PyTorch's."""

    def __init__(self, title: str) -> None:
        self.note = f"{title} ({PREDICTED})"
        self.allocator = CachingAllocator(on_segment=self.segment_changed)
        self.events: list[dict] = []
        self.time = 0
        self.label: tuple[str, ...] = ()
        """Of the request that is being served."""
        self.live: dict[Hashable, Block] = {}
        self.block_labels: dict[int, tuple[str, ...]] = {}
        """By address, of the blocks that are taken."""
        self.segment_labels: dict[int, tuple[str, ...]] = {}
        self.frames_of: dict[tuple[str, ...], list[dict]] = {}

    def serve(self, request: Request) -> None:
        """As CachingAllocator.serve, with an event for each thing that happens."""
        old = self.live.get(request.key)
        if old is None or request.nbytes != old.requested:
            self.label = request.label
            if request.nbytes != 0:
                self.take(request)
            elif old is not None:
                del self.live[request.key]
            if old is not None:
                self.give_back(old)
        self.time += 1

    def take(self, request: Request) -> None:
        block = self.live[request.key] = self.allocator.allocate(request.nbytes)
        self.block_labels[block.address] = request.label
        self.event("alloc", block.address, request.nbytes, request.label)

    def give_back(self, block: Block) -> None:
        # Going back in time, the viewer names what was there by the frames of the event that freed it.
        label = self.block_labels.pop(block.address)
        self.event("free_requested", block.address, block.requested, label)
        self.event("free_completed", block.address, block.requested, label)
        self.allocator.free(block)

    def segment_changed(self, action: str, segment: Segment) -> None:
        self.segment_labels[segment.address] = self.label
        self.event(action, segment.address, segment.size, self.label)

    def event(self, action: str, address: int, size: int, label: tuple[str, ...]) -> None:
        self.events.append(
            {
                "action": action,
                "addr": address,
                "size": size,
                "stream": 0,
                "time_us": self.time,
                "frames": self.frames(label),
                "pool_id": (0, 0),
            }
        )

    def frames(self, label: tuple[str, ...]) -> list[dict]:
        """One list for each label, which pickle then writes once."""
        if label not in self.frames_of:
            names = (*label, self.note)
            self.frames_of[label] = [{"filename": "predicted", "line": 0, "name": name} for name in names]
        return self.frames_of[label]

    def snapshot(self) -> dict:
        return {
            "segments": [self.segment(segment) for segment in self.allocator.segments],
            "device_traces": [self.events],
            "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": False},
            "external_annotations": [],
        }

    def segment(self, segment: Segment) -> dict:
        blocks = segment.blocks
        taken = [block for block in blocks if block.taken]
        allocated = sum(block.size for block in taken)
        return {
            "device": 0,
            "address": segment.address,
            "total_size": segment.size,
            "allocated_size": allocated,
            # Active is also what another stream still uses after its free; there is one stream.
            "active_size": allocated,
            "requested_size": sum(block.requested for block in taken),
            "stream": 0,
            "segment_type": segment.pool,
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": self.frames(self.segment_labels[segment.address]),
            "blocks": [self.block(block) for block in blocks],
        }

    def block(self, block: Block) -> dict:
        return {
            "address": block.address,
            "size": block.size,
            "requested_size": block.requested,
            "state": "active_allocated" if block.taken else "inactive",
            "frames": self.frames(self.block_labels[block.address]) if block.taken else [],
        }
