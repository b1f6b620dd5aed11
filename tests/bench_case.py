"""A small row of the benchmark, rows as it keeps them, and what a console shows, for its tests."""

import io
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console

from bench.rows import Row
from bench.shapes import Layer
from bench.timing_cases import Case

CPU = torch.device("cpu")
SMALL = Layer(
    name="conv3x3-8", x_shape=(2, 4, 9, 7), w_shape=(8, 4, 3, 3), stride=(2, 1), padding=(1, 1), dilation=(1, 1),
    groups=1,
)  # fmt: skip


def case(contender: str = "torch", kind: str = "float32", group: str = "forward", **changes) -> Case:
    made = Case(group=group, contender=contender, kind=kind, model="simplenet", subject=SMALL)
    return replace(made, **changes)


def rows_of(*contenders: str, on_gpu: bool = False) -> list[Row]:
    figures = {
        "tflops": 1234.5, "gb_per_s": 3210.0, "roofline_share": 0.98, "peak_bytes": 2**34, "roofline": "H100 SXM",
        "nvml_process_bytes": 2**36, "host_seconds": 0.01234,
    }  # fmt: skip
    return [
        Row(
            group="relu_max_pool_grad", what="simplenet conv7x7-512-s2", kind="bfloat16", contender=contender,
            backend="native", seconds=12.3456 / (1 + number), figures=figures if on_gpu else {}, target=1.0,
        )
        for number, contender in enumerate(contenders)
    ]  # fmt: skip


def shown(draw: Callable[[Console], object], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    draw(console)
    return console.export_text()
