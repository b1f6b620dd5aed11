"""What is told where memory ran out: how many images were asked for, what they are predicted to take, how many fit.

Nothing of it is tried: it is the account of the step on meta tensors, replayed through a model of PyTorch's allocator
(bench.measure.predict), against the memory that the GPU has for this process at that moment.
"""

import dataclasses
import functools

import torch

from bench.measure.account import Account
from bench.measure.at_hand import NoGpu, find_gpu
from bench.measure.predict import Range, fits, in_mib, largest_batch, predict
from train.recipes import Settings
from train.rehearsal import STEPS, Step, Training, rehearse

LEAST_IMAGES = 2
"""Of a step: batch norm over one image of one pixel has nothing to norm by."""


def describe(
    step: Step, device: torch.device, settings: Settings | None = None, *, flag: str, work: type[Training] = Training,
    processes: int = 1, besides: int = 0,
) -> str:
    """One line for `step` on `device`, which ran out of memory; `flag` is the option that says how many images.

    step        of one of so many `processes`; the line names the images of all of them
    settings    of the run, whose optimiser and memory format count; None as in `Training`
    besides     bytes that this process keeps beside the step
    """
    images, size = step.batch_size * processes, step.image_size
    kind = "memory" if device.type == "cpu" else "GPU memory"
    asked = f"not enough {kind} for {images} images of {size} px at once"
    if device.type == "cpu":
        account = rehearse(step, "cpu", steps=STEPS, settings=settings, work=work)
        return f"{asked}; predicted are {in_mib(whole(account.peak.nbytes + besides))}: take a smaller {flag}"
    try:
        gpu, free = find_gpu(device), room(device)
    except (NoGpu, RuntimeError) as reason:  # a GPU that is full may refuse even to be asked
        return f"{asked}; nothing is predicted ({reason}): take a smaller {flag}"

    @functools.cache
    def account_of(batch: int) -> Account:
        return rehearse(
            dataclasses.replace(step, batch_size=batch), gpu.arch, multiprocessors=gpu.multiprocessors, steps=STEPS,
            settings=settings, work=work,
        )

    # Beside the step lie the images of the next, whole and as they are cropped: not more than twice the batch.
    besides += 2 * 3 * 4 * step.batch_size * size**2
    left = whole(max(0, free.low - besides))
    needed = predict(account_of(step.batch_size), gpu).reserved + whole(besides)
    told = f"{asked}; predicted are {in_mib(needed)}, free {in_mib(free)}"
    if fits(account_of(step.batch_size), gpu, pessimistic=True, room=left):
        return f"{told}: other processes may have taken it for a moment; try again, or take a smaller {flag}"
    if step.batch_size <= LEAST_IMAGES:
        return f"{told}: take a smaller --image-size"
    largest = largest_batch(
        account_of, gpu, pessimistic=True, least=LEAST_IMAGES, below=step.batch_size, room=left
    )
    if largest == 0:
        return f"{told}, which is too little for {LEAST_IMAGES * processes}: take a smaller --image-size"
    return f"{told}; {flag} {largest * processes} is predicted to fit"


def room(device: torch.device) -> Range:
    """Bytes that PyTorch's allocator may hold on a GPU: what is free, and what it has already."""
    free, _ = torch.cuda.mem_get_info(device)
    return whole(free + torch.cuda.memory_reserved(device))


def whole(nbytes: int) -> Range:
    """A range that is one number."""
    return Range(nbytes, nbytes)
