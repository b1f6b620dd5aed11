"""The bytes that operators move, against sums by hand, and the table of them."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.measure import at_hand
from bench.measure.meta import in_the_role_of
from bench.measure.predict import MIB
from bench.measure.traffic import BIAS_GRAD, INPUT_GRAD, WEIGHT_GRAD, Move, counting
from bench.memory import command
from kernels import Conv2d, fuse, runtime
from kernels.ops import forward_op, weight_grad_op
from train.rehearsal import CONVOLUTIONS

SMALL = ("--batch-size", 8, "--image-size", 32)
N, C, S = 4, 8, 16
X, W, B = 4 * N * C * S * S, 4 * C * C * 9, 4 * C
"""Bytes of x (N, C, S, S), w (C, C, 3, 3) and b (C,) in float32."""


def meta(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.empty(shape, device="meta", memory_format=layout)


def cells(out: str, name: str) -> list[str]:
    return re.search(rf"^ *{re.escape(name)} +(.*)$", out, re.MULTILINE)[1].split()


def moved(*calls) -> list[int]:
    """What each call moves, all of its operators together."""
    found = []
    for call in calls:
        with counting("meta") as moves:
            call()
        found.append(sum(move.nbytes for move in moves))
    return found


@pytest.fixture
def traffic_run(run_main, monkeypatch):
    """traffic_run("simplenet", ...) -> (exit code, stdout, stderr), with --traffic."""

    def no_gpu():
        raise at_hand.NoGpu("no NVML: not in this test")

    monkeypatch.setattr(at_hand, "find_gpu", no_gpu)
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run_main, command.main, "--traffic")


@pytest.fixture
def report_of(traffic_run):
    def run(*arguments: object) -> tuple[dict, str]:
        """What --json has, and stdout."""
        code, out, err = traffic_run(*arguments, "--json", "t.json")
        assert (code, err) == (0, "")
        return json.loads(Path("t.json").read_text()), out

    return run


def test_operands_are_read_and_results_written_once():
    a, b = meta(N, C), meta(N, C)
    size = N * C * 4
    with counting("meta") as moves:
        torch.add(a, b)
    assert moves == [Move(operator="aten.add", read=2 * size, written=size)]
    assert moved(lambda: a * a, lambda: torch.stack([a, b, a]), lambda: torch._foreach_add([a, b], 1)) == [
        2 * size, 2 * size + 3 * size, 4 * size,
    ]  # fmt: skip


def test_in_place_results_are_read_and_written_and_overwritten_ones_written():
    a, b = meta(N, C), meta(N, C)
    size = N * C * 4
    assert moved(
        lambda: a.relu_(), lambda: a.add_(b), lambda: a.zero_(), lambda: a.copy_(b), lambda: torch.add(a, a, out=b),
        lambda: torch._foreach_mul_([a, b], 2),
    ) == [2 * size, 3 * size, size, 2 * size, 2 * size, 4 * size]  # fmt: skip


def test_expanded_operands_and_parts_count_what_lies_there():
    row, whole = meta(1, C), meta(N, C)
    size = N * C * 4
    left, right = whole.chunk(2, 1)
    assert moved(
        lambda: row.expand(N, C) + whole, lambda: whole[:1].expand(N, C).clone(), lambda: left + 1,
        lambda: left * right, lambda: left * left,
    ) == [C * 4 + 2 * size, C * 4 + size, size, size + size // 2, size]  # fmt: skip


def test_views_and_uninitialised_tensors_move_nothing():
    a = meta(N, C, S, S)
    assert moved(
        lambda: a.view(-1).view(N, -1).transpose(0, 1).unsqueeze(0), lambda: a.detach(), lambda: a.permute(1, 0, 2, 3),
        lambda: a.expand(3, N, C, S, S), lambda: torch.empty_like(a), lambda: a.new_empty(3), lambda: a.unbind(),
        lambda: torch.ops.aten._unsafe_view(a, [-1]), lambda: a.as_strided_([N], [1]), lambda: a.contiguous(),
    ) == [0] * 10  # fmt: skip
    assert moved(lambda: torch.ones_like(meta(N, C))) == [N * C * 4]  # whose operand has the shape alone


def test_other_devices_are_not_counted():
    assert moved(lambda: torch.zeros(5) + 1, lambda: torch.zeros(3).to("meta")) == [0, 12]


@pytest.mark.parametrize("asked", [(True, True, True), (True, False, False), (False, True, True), (False, True, False)])
def test_gradients_of_a_convolution_are_told_apart_by_what_is_asked_for(asked):
    x, w, dy = meta(N, C, S, S), meta(C, C, 3, 3), meta(N, C, S, S)
    with counting("meta") as moves:
        torch.ops.aten.convolution_backward(dy, x, w, [C], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, asked)
    of = {INPUT_GRAD: (X + W, X), WEIGHT_GRAD: (2 * X, W), BIAS_GRAD: (X, B)}
    expected = {part: nbytes for (part, nbytes), wanted in zip(of.items(), asked, strict=True) if wanted}
    assert {move.part: (move.read, move.written) for move in moves} == expected


def chain(conv: type[nn.Conv2d]) -> dict[str, list[int]]:
    """Bytes by operator of convolution, ReLU, convolution, ReLU, max-pool, and of the gradients of all parameters."""
    with torch.device("meta"):
        layers = [conv(C, C, 3, padding=1), nn.ReLU(inplace=True), conv(C, C, 3, padding=1), nn.ReLU(inplace=True)]
        net = nn.Sequential(*layers, nn.MaxPool2d(2))
    layout = torch.contiguous_format
    if conv is Conv2d:
        layout = torch.channels_last
        net = fuse(net.to(memory_format=layout))
    with counting("meta") as moves:
        net(meta(N, C, S, S, layout=layout)).backward(meta(N, C, S // 2, S // 2, layout=layout))
    found: dict[str, list[int]] = {}
    for move in moves:
        found.setdefault(move.part or move.operator, []).append(move.nbytes)
    return found


def test_a_native_chain():
    y, index = X // 4, X // 2  # int64
    assert chain(nn.Conv2d) == {
        "aten.convolution": [2 * X + W + B] * 2,
        "aten.relu_": [2 * X] * 2,
        "aten.max_pool2d_with_indices": [X + y + index],
        "aten.max_pool2d_with_indices_backward": [y + index + X],
        "aten.threshold_backward": [3 * X] * 2,
        INPUT_GRAD: [2 * X + W],
        WEIGHT_GRAD: [2 * X + W] * 2,
        BIAS_GRAD: [X + B] * 2,
    }


def test_a_fused_chain_reads_masks_instead_of_writing_masked_gradients():
    y, index, mask = X // 4, X // 16, X  # uint8; the second convolution's ReLU is the pool's
    assert chain(Conv2d) == {
        "conv_lab.forward": [2 * X + W + B] * 2,
        "conv_lab.max_pool": [X + y + index],
        "conv_lab.max_pool_grad": [y + index + X],
        "conv_lab.input_grad": [2 * X + W],
        "conv_lab.weight_grad": [2 * X + W, 2 * X + W + mask],
        "conv_lab.bias_grad": [X + B, X + B + mask],
    }


@pytest.mark.parametrize("op", ["forward", "weight_grad"])
def test_launchers_buffers_are_written_and_read(op):
    x, w, window = meta(N, C, S, S), meta(C, C, 3, 3), ([1, 1], [1, 1], [1, 1], 1)
    taken: dict[str, int] = {}
    listening = runtime.on_allocate(lambda nbytes, what, tensor: taken.update({what: nbytes}))
    with in_the_role_of("sm_90", 132), listening, counting("meta") as moves:
        if op == "forward":
            forward_op(x, w, None, *window)
        else:
            weight_grad_op(meta(N, C, S, S), x, w.shape, *window, False)
    (move,) = moves
    assert (move.read, move.written) == {"forward": (X + W, X), "weight_grad": (2 * X, W)}[op]
    del taken[{"forward": "output", "weight_grad": "weight gradient"}[op]]
    assert move.buffers == 2 * sum(taken.values())
    copies = {"forward": {"weight as channels-last": W}, "weight_grad": {"output gradient as channels-last": X}}[op]
    assert (copies | {"input as channels-last": X}).items() <= taken.items()
    assert ("split-K workspace" in taken) == (op == "weight_grad")


def test_simplenets_relus_and_pools_by_hand(report_of):
    """Batch 256, 128 px: a feature map of c channels and s pixels a side has c * s * s / 4096 of these MiB."""
    report, _ = report_of("simplenet", "--gpu", "h100")
    entries = report["convolutions"].items()
    of = {conv: {row: nbytes / MIB for row, nbytes in entry["rows"].items()} for conv, entry in entries}
    first, second, third = 256, (64, 64, 256), (32, 32, 128)
    relus = first + sum(second) + sum(third)
    for conv in ("torch", "unfold", "triton-unfused"):
        assert of[conv]["ReLU forward"] == 2 * relus == 1664
        assert of[conv]["ReLU backward"] == 3 * relus == 2496
        pools = 2 * 256 + 2 * 64 + 2 * 64 * 2  # int64 indices
        assert of[conv]["max-pool forward"] == of[conv]["max-pool backward"] == pools == 896
    fused, alone, forward = of["triton"], of["triton-unfused"], "convolution forward"
    assert fused["ReLU forward"] == fused["ReLU backward"] == fused[forward] - alone[forward] == 0
    assert fused["max-pool forward"] == fused["max-pool backward"] == 2 * 256 + 2 * 64 + 2 * 64 // 4 == 672
    for row in (INPUT_GRAD, WEIGHT_GRAD, BIAS_GRAD):
        assert fused[row] == alone[row] + 64 + 64 + sum(third)  # the ReLUs of the others are the pools'


def test_the_table_is_the_rows_and_they_sum_to_the_total(report_of):
    report, out = report_of("customnet", *SMALL)
    entries = report["convolutions"]
    assert list(entries) == list(CONVOLUTIONS)
    for entry in entries.values():
        assert entry["total"] == sum(entry["rows"].values()) == sum(entry["by_operator"].values())
        assert entry["total"] == entry["read"] + entry["written"] + entry["launchers_buffers"]
        assert entry["ratio"] == pytest.approx(entry["total"] / entries["torch"]["total"], abs=1e-4)
    for name in entries["torch"]["rows"]:
        moved = [entry["rows"][name] for entry in entries.values()]
        assert (name in out) == any(moved)
        assert not any(moved) or cells(out, name) == [f"{n / MIB:,.1f}" if n else "-" for n in moved]
    assert cells(out, "all together") == [f"{entry['total'] / MIB:,.1f}" for entry in entries.values()]
    assert cells(out, "times torch's") == [f"{entry['ratio']:.2f}" for entry in entries.values()]
    assert entries["torch"]["launchers_buffers"] == 0 < entries["triton"]["launchers_buffers"]
    assert max(map(len, out.splitlines())) <= 80
    assert report["label"].startswith("predicted: what the step's operators must move at least")
    for text in (report["label"], *report["notes"], "for one Tesla T4"):
        assert text in " ".join(out.split())


def test_half_precision_moves_less_and_one_convolution_has_no_ratio(report_of):
    full, out = report_of("simplenet", "--conv", "triton-unfused", *SMALL, "--predict")
    assert "times" not in out
    assert "cuDNN" not in out
    mixed, _ = report_of("simplenet", "--conv", "triton-unfused", *SMALL, "--amp", "fp16")
    full, half = (report["convolutions"]["triton-unfused"]["rows"]["ReLU forward"] for report in (full, mixed))
    assert half == full / 2


@pytest.mark.slow
def test_all_models_have_a_line_each(report_of):
    told, out = report_of("all", "--conv", "torch", "triton", "--batch-size", 4, "--image-size", 64)
    for report in told["reports"]:
        totals = [f"{entry['total'] / MIB:,.1f}" for entry in report["convolutions"].values()]
        assert cells(out.split("all together")[1], report["model"]) == totals
    assert out.count("times torch's") == len(told["reports"]) == 4


@pytest.mark.parametrize(
    "flags",
    [("--live",), ("--fits", "t4"), ("--timeline", "t.png"), ("--snapshot", "s.pickle", "--conv", "torch")],
    ids=lambda flags: flags[0],
)
def test_flags_of_memory_are_refused_in_a_line(traffic_run, flags):
    code, out, err = traffic_run("simplenet", *flags)
    assert (code, out) == (2, "")
    words = f"{flags[0]} is of the memory taken, --traffic of the bytes moved; leave one out"
    assert err == f"bench.memory: error: {words}\n"
