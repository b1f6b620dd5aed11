"""--profile N: where the time of N training steps goes, as a table of operators and as a trace."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from train.files import atomic_write

WARM_UP = 2  # steps before the first profiled one: compilation, allocation, caches
ROWS = 15


class Profiler:
    """Told of every step, it profiles N of them and writes profile.txt and trace.json into `folder`."""

    def __init__(self, steps: int, folder: Path, console: Console, device: torch.device):
        self.steps, self.folder, self.console = steps, folder, console
        self.made = 0
        self.sort_by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self._activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its probes, and of GPUs that are not there
        self._profile = profile(activities=self._activities)

    def step(self) -> None:
        """After each training step."""
        self.made += 1
        if self.made == WARM_UP:
            self._profile.start()
        elif self.made == WARM_UP + self.steps:
            self._profile.stop()
            self._write()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside the block, a validation between two training steps, is not profiled."""
        running = WARM_UP <= self.made < WARM_UP + self.steps
        if running:
            self._profile.toggle_collection_dynamic(False, self._activities)
        try:
            yield
        finally:
            if running:
                self._profile.toggle_collection_dynamic(True, self._activities)

    def _write(self) -> None:
        averages = self._profile.key_averages()
        with atomic_write(self.folder / "profile.txt") as file:
            file.write(averages.table(sort_by=self.sort_by, row_limit=-1, max_name_column_width=60).encode())
        trace = self.folder / "trace.json"
        self._write_trace(trace)
        self.console.print(operator_table(averages, self.steps, self.sort_by), highlight=False)
        self.console.print(
            f"all operators in {self.folder / 'profile.txt'}; {trace} opens in chrome://tracing or ui.perfetto.dev",
            soft_wrap=True, highlight=False,
        )

    def _write_trace(self, path: Path) -> None:
        """Raises OSError naming `path`. Kineto itself tells nobody of a full disk: its file is then not there."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._profile.export_chrome_trace(str(temporary))
        try:
            os.replace(temporary, path)
        except FileNotFoundError:
            temporary.with_name(f"{temporary.name}.tmp").unlink(missing_ok=True)  # Kineto's, half written
            raise OSError(errno.EIO, "it could not be written; is the disk full?", str(path)) from None


def operator_table(averages: list, steps: int, sort_by: str) -> Table:
    """The ROWS operators that take most time of their own, in milliseconds a step."""
    where = "GPU" if "device" in sort_by else "CPU"
    table = Table(box=box.SIMPLE_HEAD, title=f"{steps} training steps by operator, time of their own")
    table.add_column("operator", overflow="fold")
    for name in (f"{where} ms\na step", "share", "calls\na step"):
        table.add_column(name, justify="right")
    own = {row.key: getattr(row, sort_by) for row in averages}  # microseconds
    total = sum(own.values()) or 1
    for row in sorted(averages, key=lambda row: -own[row.key])[:ROWS]:
        mine = own[row.key]
        table.add_row(row.key, f"{mine / 1e3 / steps:,.2f}", f"{100 * mine / total:.1f}%", f"{row.count / steps:,.1f}")
    return table
