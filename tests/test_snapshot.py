"""Predicted memory histories, as PyTorch's own readers of recorded ones see them."""

import pickle
import pickletools
from pathlib import Path

import pytest
from torch.cuda import _memory_viz

from bench.measure.allocator import CachingAllocator, Request
from bench.measure.snapshot import PREDICTED, snapshot, write

MIB = 2**20
WEIGHT = ("weight", "conv1", "parameters")
COLUMNS = ("aten.im2col", "conv1", "saved for backward")
STEP = (
    Request(0, 1000, WEIGHT),
    Request(1, 12 * MIB, COLUMNS),
    Request(2, 3 * MIB, ("aten.relu", "relu1", "temporaries")),
    Request(1, 0),
    Request(3, 5 * MIB, ("aten.im2col", "conv2", "saved for backward")),
    Request(2, 0),
)
"""Leaves the weight, 1024 of 2 MiB, and the columns of conv2, 5 of the 12 MiB that those of conv1 had."""


@pytest.fixture(scope="module")
def step() -> dict:
    return snapshot(STEP, title="two convolutions")


def actions(result: dict) -> list[tuple]:
    (events,) = result["device_traces"]
    first = min(event["addr"] for event in events)
    return [(event["action"], event["addr"] - first, event["size"]) for event in events]


def names(entry: dict) -> tuple[str, ...]:
    """The label of an event or a block, without the title."""
    return tuple(frame["name"] for frame in entry["frames"])[:-1]


def test_events_are_those_of_the_allocator_in_its_order(step):
    assert actions(step) == [
        ("segment_alloc", 32 * MIB, 2 * MIB),
        ("alloc", 32 * MIB, 1000),
        ("segment_alloc", 20 * MIB, 12 * MIB),
        ("alloc", 20 * MIB, 12 * MIB),
        ("segment_alloc", 0, 20 * MIB),
        ("alloc", 0, 3 * MIB),
        ("free_requested", 20 * MIB, 12 * MIB),
        ("free_completed", 20 * MIB, 12 * MIB),
        ("alloc", 20 * MIB, 5 * MIB),
        ("free_requested", 0, 3 * MIB),
        ("free_completed", 0, 3 * MIB),
    ]
    assert [event["time_us"] for event in step["device_traces"][0]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5]


def test_segments_are_what_is_left(step):
    assert [
        (
            segment["segment_type"],
            segment["total_size"],
            segment["allocated_size"],
            segment["active_size"],
            segment["requested_size"],
            [(block["size"], block["requested_size"], block["state"]) for block in segment["blocks"]],
        )
        for segment in step["segments"]
    ] == [
        ("large", 20 * MIB, 0, 0, 0, [(20 * MIB, 0, "inactive")]),
        ("large", 12 * MIB, 5 * MIB, 5 * MIB, 5 * MIB,
         [(5 * MIB, 5 * MIB, "active_allocated"), (7 * MIB, 0, "inactive")]),
        ("small", 2 * MIB, 1024, 1024, 1000, [(1024, 1000, "active_allocated"), (2 * MIB - 1024, 0, "inactive")]),
    ]  # fmt: skip
    for segment in step["segments"]:
        ends = [block["address"] + block["size"] for block in segment["blocks"]]
        assert [block["address"] for block in segment["blocks"]] == [segment["address"], *ends[:-1]]
        assert ends[-1] == segment["address"] + segment["total_size"]


def test_labels_arrive_at_events_segments_and_blocks(step):
    relu, conv2 = STEP[2].label, STEP[4].label
    events = {(event["action"], event["size"]): names(event) for event in step["device_traces"][0]}
    assert events["segment_alloc", 12 * MIB] == events["alloc", 12 * MIB] == COLUMNS
    assert events["free_requested", 12 * MIB] == events["free_completed", 12 * MIB] == COLUMNS
    assert [names(segment) for segment in step["segments"]] == [relu, COLUMNS, WEIGHT]
    blocks = [block for segment in step["segments"] for block in segment["blocks"]]
    assert [names(block) for block in blocks if block["state"] == "active_allocated"] == [conv2, WEIGHT]
    assert [block["frames"] for block in blocks if block["state"] == "inactive"] == [[], [], []]


def test_everything_says_that_it_is_predicted_and_of_what(step):
    blocks = [block for segment in step["segments"] for block in segment["blocks"] if block["frames"]]
    note = f"two convolutions ({PREDICTED})"
    for entry in (*step["device_traces"][0], *step["segments"], *blocks):
        assert entry["frames"][-1]["name"] == note
        assert {frame["filename"] for frame in entry["frames"]} == {"predicted"}


def test_a_resized_storage_moves_to_a_new_block_while_the_old_one_is_still_there():
    result = snapshot([Request(7, 1000, ("a",)), Request(7, 3000, ("b",)), Request(7, 600, ("c",))], title="")
    assert actions(result) == [
        ("segment_alloc", 0, 2 * MIB),
        ("alloc", 0, 1000),
        ("alloc", 1024, 3000),
        ("free_requested", 0, 1000),
        ("free_completed", 0, 1000),
        ("alloc", 0, 600),
        ("free_requested", 1024, 3000),
        ("free_completed", 1024, 3000),
    ]
    assert [names(event) for event in result["device_traces"][0]] == [
        ("a",), ("a",), ("b",), ("a",), ("a",), ("c",), ("b",), ("b",),
    ]  # fmt: skip


def test_what_changes_nothing_leaves_no_event():
    empty = [Request(1, 0, ("empty",)), Request(1, 0)]
    assert snapshot(empty, title="") == snapshot([], title="")
    assert actions(snapshot([Request(1, 512, ("a",)), Request(1, 512, ("b",))], title="")) == [
        ("segment_alloc", 0, 2 * MIB),
        ("alloc", 0, 512),
    ]


def test_a_freed_storage_may_come_again():
    result = snapshot([Request(1, 512, ("a",)), Request(1, 0), Request(1, 1024, ("b",))], title="")
    assert [action for action, *_ in actions(result)[1:]] == ["alloc", "free_requested", "free_completed", "alloc"]
    assert names(result["segments"][0]["blocks"][0]) == ("b",)


def test_pytorch_summary_has_the_totals(step):
    lines = _memory_viz.segsum(step).splitlines()
    assert "segments: 3" in lines
    assert "total_reserved: 34.0MiB" in lines
    assert "total_allocated: 5.0MiB" in lines
    assert "[ ] 20.0MiB allocated, 20.0MiB (0.0% internal) free" in lines


def test_pytorch_flamegraph_has_bytes_under_our_labels(step):
    flames = _memory_viz.memory(step, format_flamegraph=str).splitlines()
    root = f"stream_0;active_allocated;predicted:0:two convolutions ({PREDICTED})"
    assert f"{root};predicted:0:parameters;predicted:0:conv1;predicted:0:weight 1000" in flames
    assert f"{root};predicted:0:saved for backward;predicted:0:conv2;predicted:0:aten.im2col {5 * MIB}" in flames
    sizes = [int(flame.rpartition(" ")[2]) for flame in flames]
    assert sum(sizes) == 34 * MIB


def test_pytorch_trace_names_every_event(step):
    *lines, total = _memory_viz.trace(step).splitlines()
    assert total.startswith("TOTAL MEM")
    assert lines == [
        "Device 0 ----------------",
        "11 entries",
        f"a = cudaMalloc({step['segments'][2]['address']}, 2.0MiB)",
        "b = a[0:1000.0B]",
        f"c = cudaMalloc({step['segments'][1]['address']}, 12.0MiB)",
        "d = c[0:12.0MiB]",
        f"e = cudaMalloc({step['segments'][0]['address']}, 20.0MiB)",
        "f = e[0:3.0MiB]",
        "del d # 12.0MiB",
        "# free completed for d 12.0MiB",
        "g = c[0:5.0MiB]",
        "del f # 3.0MiB",
        "# free completed for f 3.0MiB",
    ]


@pytest.mark.parametrize("page", ["trace_plot", "segment_plot"])
def test_pytorch_makes_its_html_pages_of_it(step, page):
    assert "snapshot.pickle" in getattr(_memory_viz, page)(step)


def test_what_is_never_freed_remains_when_pairs_are_filtered():
    left = _memory_viz.filter_alloc_free_pairs(snapshot(STEP, title=""))
    assert [names(event) for event in left["device_traces"][0] if event["action"] == "alloc"] == [WEIGHT, STEP[4].label]


def test_the_events_alone_give_the_peaks_of_the_allocator():
    changes = [Request(i, (i * 7919) % (3 * MIB) + 1, (str(i),)) for i in range(200)]
    changes = [change for i, made in enumerate(changes) for change in (made, Request(i - i % 3 - 2, 0))]
    changes += [Request(199, 0), Request(198, 0)]
    allocator, blocks = CachingAllocator(), {}
    for change in changes:
        if change.nbytes:
            blocks[change.key] = allocator.allocate(change.nbytes)
        elif change.key in blocks:
            allocator.free(blocks.pop(change.key))
    taken = reserved = peak_taken = peak_reserved = 0
    for action, _, size in actions(snapshot(changes, title="")):
        taken += {"alloc": size, "free_completed": -size}.get(action, 0)
        reserved += {"segment_alloc": size, "segment_free": -size}.get(action, 0)
        peak_taken, peak_reserved = max(peak_taken, taken), max(peak_reserved, reserved)
    assert (taken, peak_taken) == (allocator.requested, allocator.peak_requested)
    assert (reserved, peak_reserved) == (allocator.reserved, allocator.peak_reserved)
    assert 0 < taken < peak_taken


VIEWER_READS = {
    "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE", "DICT",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK",
    "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip
"""What `unpickle` in torch/utils/viz/MemoryViz.js knows; protocols 2 to 4."""


def test_the_file_reads_back_and_has_only_what_the_viewer_can_read(step, tmp_path: Path):
    path = tmp_path / "step.pickle"
    with open(path, "wb") as file:
        write(file, step)
    assert pickle.loads(path.read_bytes()) == step
    codes = list(pickletools.genops(path.read_bytes()))
    assert {code.name for code, _, _ in codes} <= VIEWER_READS
    assert [protocol for code, protocol, _ in codes if code.name == "PROTO"] == [4]
