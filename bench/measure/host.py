"""The machine's own memory, as `bench.measure.sampling` follows it where there is no GPU: the resident set.

    with Recorder(open_device=open_host) as recorder:
        ...

A process's resident set is what of its memory lies in RAM, shared libraries and mapped files included, as the kernel
counts it, which is to within some pages a core. It is no GPU memory and compares with none.

Source: proc_pid_statm(5) and proc_meminfo(5), https://man7.org/linux/man-pages/.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

PAGE = os.sysconf("SC_PAGE_SIZE")

STALE = 0.1
"""Seconds. The machine's figure takes the kernel five times as long as the process's, and is mostly of others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Memory of the machine at one moment, in bytes."""

    total: int
    """What the machine has; a container's limit is not looked at."""
    used: int
    """What is not available to a new process: taken by all, less what the kernel can give back. At most STALE old."""
    process: int
    """The resident set of this process."""
    notes: tuple[str, ...] = ()
    """Always empty: nothing is missing from these figures."""


@contextlib.contextmanager
def open_host() -> Iterator["Host"]:
    """This machine and the process that opens it. Raises OSError where there is no /proc."""
    with open("/proc/meminfo", "rb", buffering=0) as machine, open("/proc/self/statm", "rb", buffering=0) as process:
        yield Host(machine.fileno(), process.fileno())


class Host:
    """A machine while its files in /proc are open."""

    def __init__(self, machine: int, process: int) -> None:
        self.machine, self.process = machine, process
        self.total = self.used = 0
        self.asked = float("-inf")

    def memory(self) -> HostMemory:
        """The memory now."""
        # Read at 0, an open file of /proc is made anew: half the time of opening it for each sample.
        if (now := time.monotonic()) - self.asked >= STALE:
            told = dict(line.split(b":", 1) for line in os.pread(self.machine, 256, 0).splitlines()[:3])
            total, available = (1024 * int(told[name].split()[0]) for name in (b"MemTotal", b"MemAvailable"))
            self.total, self.used, self.asked = total, total - available, now
        resident = PAGE * int(os.pread(self.process, 128, 0).split()[1])
        return HostMemory(total=self.total, used=self.used, process=resident)

    def conditions(self) -> None:
        """Nothing is told of clocks and heat."""
