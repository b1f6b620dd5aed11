"""Triton's cache, filled by all cores before the GPU is used: one process would compile for minutes between timings.

The processes need no GPU. They compile what a launch would, through the JIT's own specialisation, so that the launch
finds it in Triton's cache on disk; where it does not, it compiles as ever.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from kernels import runtime

MOST_PROCESSES = 16

Job = Callable[[], object]
"""Calls launchers on meta tensors. It goes to another process: a function of a module, or its `partial`."""


def compile_all(jobs: Sequence[Job], arch: str) -> dict[str, int | str]:
    """Compiles what each job launches for `arch`; how many were, by how many processes, and the first error."""
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(jobs))
    if arch not in runtime.MULTIPROCESSORS:
        return {"compiled": 0, "of": len(jobs), "error": f"{arch} is none that is compiled for ahead"}
    if processes < 3:
        return {"compiled": 0, "of": len(jobs), "error": "too few cores for it to save time"}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, job, arch) for job in jobs]
        errors = [error for future in futures if (error := future.exception()) is not None]
    found: dict[str, int | str] = {"compiled": len(jobs) - len(errors), "of": len(jobs), "processes": processes}
    return found | ({"error": " ".join(f"{type(errors[0]).__name__}: {errors[0]}".split())[:300]} if errors else {})


def compile_one(job: Job, arch: str) -> None:
    with runtime.compiling_ahead(arch):
        job()
