"""What a training step moves to and from DRAM at least, by what its operators do: counted on meta tensors."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import models
from bench.conditions import conditions
from bench.measure.meta import in_the_role_of
from bench.measure.predict import GpuKind
from bench.measure.traffic import BIAS_GRAD, INPUT_GRAD, WEIGHT_GRAD, Move, counting
from bench.memory.report import dtype_of
from train.rehearsal import BACKWARD, NUM_CLASSES, STEPS, Step, Training

LABEL = (
    "predicted: what the step's operators must move at least, each operand read once and each result written once; "
    "caches may save some, and repeated reads cost more"
)
OPTIMIZER, REST = "optimizer", "loss and rest"
# What stands in the row: operators, or how their names begin where a star says so. What fits none is rest.
ROWS = {
    "convolution forward": ("aten.convolution", "conv_lab.forward", "conv_lab.variant_*"),
    INPUT_GRAD: (INPUT_GRAD, "conv_lab.input_grad"),
    WEIGHT_GRAD: (WEIGHT_GRAD, "conv_lab.weight_grad"),
    BIAS_GRAD: (BIAS_GRAD, "conv_lab.bias_grad"),
    "ReLU forward": ("aten.relu*", "aten.clamp_min*"),
    "ReLU backward": ("aten.threshold_backward",),
    "max-pool forward": ("aten.max_pool2d_with_indices", "conv_lab.max_pool"),
    "max-pool backward": ("aten.max_pool2d_with_indices_backward", "conv_lab.max_pool_grad"),
    "average pool": ("aten.avg_pool2d*", "aten.mean", "aten._adaptive_avg_pool2d*"),
    "batch norm": ("aten.native_batch_norm*", "aten.cudnn_batch_norm*"),
    "layer norm": ("aten.native_layer_norm*",),
    "unfold and fold": ("aten.im2col", "aten.col2im"),
    "matrix products": ("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm"),
    "attention": ("aten._scaled_dot_product*",),
    "GELU": ("aten.gelu*",),
    "copies and casts": ("aten.clone", "aten.copy_", "aten._to_copy", "aten.stack", "aten.cat"),
    "additions and sums": ("aten.add", "aten.add_", "aten.sum"),
    OPTIMIZER: (),
    REST: (),
}


def make_report(steps: Sequence[Step], gpu: GpuKind) -> dict[str, Any]:
    """Of one model's `steps`, one a convolution, on `gpu`, as plain types; sizes are bytes.

    Ratios are to nn.Conv2d, or where that is not among them to the first.
    """
    counted = {step.conv: entry(*count(step, gpu)) for step in steps}
    reference = "torch" if "torch" in counted else next(iter(counted))
    for told in counted.values():
        told["ratio"] = round(told["total"] / counted[reference]["total"], 4)
    step = steps[0]
    return {
        "model": step.model,
        "batch_size": step.batch_size,
        "image_size": step.image_size,
        "num_classes": NUM_CLASSES,
        "dtype": dtype_of(step),
        "recipe": "writeup",
        "label": LABEL,
        "notes": notes(counted),
        "gpu": dataclasses.asdict(gpu),
        "reference": reference,
        "convolutions": counted,
        "conditions": conditions(torch.device("cpu")),
    }


def count(step: Step, gpu: GpuKind) -> tuple[list[Move], list[Move]]:
    """What the last of STEPS moves: forward and backward, and the optimizer step."""
    ends: dict[str, int] = {}
    with in_the_role_of(gpu.arch, gpu.multiprocessors), counting("meta") as moves:
        training = Training(step, "meta", role=gpu.arch, on_phase=lambda phase: ends.update({phase: len(moves)}))
        for _ in range(STEPS):
            moves.clear()
            training.step()
    return moves[: ends[BACKWARD]], moves[ends[BACKWARD] :]


def entry(passes: list[Move], optimizer: list[Move]) -> dict[str, Any]:
    """One convolution's part of the report, of what forward and backward move and what the optimizer does."""
    rows = dict.fromkeys(ROWS, 0)
    by_operator: dict[str, int] = {}
    for move in passes:
        rows[row_of(move)] += move.nbytes
    rows[OPTIMIZER] += sum(move.nbytes for move in optimizer)
    moves = passes + optimizer
    for move in moves:
        name = f"{move.operator}, {move.part}" if move.part else move.operator
        by_operator[name] = by_operator.get(name, 0) + move.nbytes
    return {
        "rows": rows,
        "total": sum(move.nbytes for move in moves),
        "read": sum(move.read for move in moves),
        "written": sum(move.written for move in moves),
        "launchers_buffers": sum(move.buffers for move in moves),
        "by_operator": by_operator,
    }


def row_of(move: Move) -> str:
    name = move.part or move.operator
    for row, operators in ROWS.items():
        for operator in operators:
            if name == operator or (operator.endswith("*") and name.startswith(operator[:-1])):
                return row
    return REST


def notes(convs: Iterable[str]) -> list[str]:
    """What a reader of these convolutions' rows should know."""
    found = []
    if "triton" in convs:
        found.append(
            "Of fused operators: the rows include their ReLU, and a convolution's gradients each read its mask."
        )
    if any(conv not in models.NATIVE for conv in convs):
        found.append(
            "Launchers' buffers (layout copies, transposed weights, split-K workspaces) are in their operators' rows, "
            "written once and read once each."
        )
    if "torch" in convs:
        found.append(
            "Not seen of torch's convolutions: cuDNN's workspaces and layout copies, and the addition of the bias to "
            "cuDNN's result, for which PyTorch launches another kernel."
        )
    return found
