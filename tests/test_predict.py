"""Prediction for a GPU: what an H100 was recorded to take, and small accounts by hand."""

import dataclasses

import pytest

from bench.measure.account import Account, Change, ConvolutionCall, Mark, ReductionCall, ScratchCall
from bench.measure.occupancy import LIMITS
from bench.measure.predict import (
    CUBLAS_WORKSPACE,
    CUBLASLT_WORKSPACE,
    GPUS,
    Range,
    choices,
    context_of,
    fits,
    largest_batch,
    predict,
    replay,
    room_on,
)
from kernels.runtime import MULTIPROCESSORS
from train.rehearsal import Step, rehearse

MIB = 2**20
H100, T4 = GPUS["h100"], GPUS["t4"]

# MiB by torch.cuda.max_memory_allocated and max_memory_reserved after three steps of batch 256 at 128 px, float32, by
# `python -m bench.memory MODEL` on an H100 80GB HBM3, driver 580.159.04, PyTorch 2.11.0 (CUDA 13.0, cuDNN 9.19), Triton
# 3.6.0, 2026-11-26; of triton by the kernels of commit ade99e6, after the prediction was made.
RECORDED = {
    ("simplenet", "torch"): (1588.1, 2490),
    ("simplenet", "unfold"): (2485.1, 3520),
    ("simplenet", "triton"): (764.6, 1076),
    ("simplenet", "triton-unfused"): (1588.1, 2132),
    ("customnet", "torch"): (4406.1, 5246),
    ("customnet", "unfold"): (5031.0, 5794),
    ("customnet", "triton"): (3691.2, 4024),
    ("customnet", "triton-unfused"): (4406.1, 4952),
    ("simplevit", "torch"): (1002.7, 1132),
    ("simplevit", "unfold"): (1002.7, 1270),
    ("simplevit", "triton"): (1002.7, 1130),
    ("resnet18", "torch"): (1991.3, 3576),
    ("resnet18", "unfold"): (4448.1, 7172),
    ("resnet18", "triton"): (1598.5, 2046),
    ("resnet18", "triton-unfused"): (1966.5, 2670),
}


@pytest.mark.parametrize(("model", "conv"), RECORDED, ids=["-".join(row) for row in RECORDED])
def test_an_h100_took_what_is_predicted(model, conv):
    step = Step(model=model, conv=conv, batch_size=256, image_size=128)
    predicted = predict(rehearse(step, H100.arch, multiprocessors=H100.multiprocessors, steps=3), H100)
    for figure, recorded in zip((predicted.allocated, predicted.reserved), RECORDED[model, conv], strict=True):
        assert figure.low / MIB - 0.05 <= recorded <= figure.high / MIB + 0.05
    if conv == "torch":
        assert predicted.reserved.high < 1.6 * predicted.reserved.low
    else:
        assert predicted.reserved.low == predicted.reserved.high


def change(storage: int, nbytes: int, operator: str = "aten.add") -> Change:
    return Change(storage, nbytes, "temporaries", "block", operator)


def test_changes_are_taken_and_given_back():
    """Segments of 20 MiB for what is above 1 MiB and below 10: both fit one, and it stays."""
    account = Account((change(0, 9 * MIB), change(1, 9 * MIB), change(0, 0), change(1, 0)))
    allocator = replay(account, T4, lambda call: 0)
    assert (allocator.peak_allocated, allocator.allocated) == (18 * MIB, 0)
    assert allocator.reserved == 20 * MIB


def test_a_category_that_changes_takes_nothing():
    saved = dataclasses.replace(change(0, 9 * MIB), category="saved for backward")
    assert replay(Account((change(0, 9 * MIB), saved)), T4, lambda call: 0).allocated == 9 * MIB


def test_the_peak_of_allocated_memory_is_the_last_steps():
    entries = (change(0, 90 * MIB), change(0, 0), change(1, 9 * MIB), change(1, 0))
    allocator = replay(Account(entries, start=2), T4, lambda call: 0)
    assert allocator.peak_allocated == 9 * MIB
    assert allocator.peak_reserved == 90 * MIB


def test_cublas_takes_a_workspace_in_each_thread_once():
    forward = (change(0, 512, "aten.mm"), change(1, 512, "aten.bmm"))
    backward = (Mark("forward"), change(2, 512, "aten.mm"), Mark("backward"), change(3, 512, "aten.mm"))
    assert replay(Account(forward), T4, lambda call: 0).allocated == 2 * 512 + CUBLAS_WORKSPACE
    assert replay(Account(forward + backward), T4, lambda call: 0).allocated == 4 * 512 + 2 * CUBLAS_WORKSPACE
    assert replay(Account(forward), H100, lambda call: 0).allocated == 2 * 512 + 32 * MIB
    with_bias = Account((change(0, 512, "aten.addmm"), change(1, 512, "aten.addmm")))
    assert replay(with_bias, T4, lambda call: 0).allocated == 2 * 512 + CUBLAS_WORKSPACE + CUBLASLT_WORKSPACE


def test_a_workspace_of_cudnns_comes_and_goes():
    account = Account((change(0, 30 * MIB), ConvolutionCall("aten.convolution", "block", 50 * MIB)))
    without, most = (replay(account, T4, choose) for choose in (lambda call: 0, lambda call: call.nbytes))
    assert (without.allocated, most.allocated) == (30 * MIB, 30 * MIB)
    assert (without.peak_allocated, most.peak_allocated) == (30 * MIB, 80 * MIB)
    predicted = predict(account, T4)
    assert predicted.reserved.low == 30 * MIB
    assert predicted.reserved.high > 80 * MIB


def test_a_reduction_takes_its_staging_buffer_for_the_time():
    account = Account((change(0, 2048), ReductionCall("aten.sum", "block", results=512, terms=65_536, element=4)))
    assert replay(account, H100, lambda call: 0).peak_allocated == pytest.approx(132 * MIB, rel=1e-4)
    assert replay(account, H100, lambda call: 0).allocated == 2048
    assert replay(account, T4, lambda call: 0).peak_allocated < 60 * MIB  # fewer multiprocessors, fewer parts


def test_scratch_goes_once_the_result_is_there():
    scratch = ScratchCall("aten.im2col", "block", 30 * MIB)
    account = Account((scratch, change(0, 50 * MIB, "aten.im2col"), change(1, 40 * MIB)))
    allocator = replay(account, T4, lambda call: 0)
    assert allocator.peak_requested == 90 * MIB  # not 120: it had gone before the second change
    assert [segment.size for segment in allocator.segments] == [40 * MIB, 50 * MIB, 30 * MIB]


def test_cudnn_chooses_the_same_in_every_step():
    calls = [ConvolutionCall("aten.convolution", f"block{number}", 1000) for number in range(40)]
    account = Account(tuple(calls))
    for choose in choices(account):
        assert [choose(call) for call in calls] == [choose(call) for call in calls]
    assert len({tuple(choose(call) for call in calls) for choose in choices(account)}) > 20
    again = [[choose(call) for call in calls] for choose in choices(account)]
    assert again == [[choose(call) for call in calls] for choose in choices(account)]  # in another process too


def test_without_libraries_nothing_is_a_range():
    predicted = predict(Account((change(0, 9 * MIB),)), T4)
    assert predicted.allocated == Range(9 * MIB, 9 * MIB)
    assert predicted.process == predicted.reserved + context_of(T4)


def linear(batch: int) -> Account:
    """2 MiB an image, in one storage, and 100 besides."""
    return Account((change(0, 100 * MIB), change(1, 2 * MIB * batch)))


@pytest.mark.parametrize("pessimistic", [True, False])
@pytest.mark.parametrize("name", GPUS)
def test_the_largest_batch_is_the_largest_that_fits(name, pessimistic):
    gpu = GPUS[name]
    room = room_on(gpu).low if pessimistic else room_on(gpu).high
    largest = largest_batch(linear, gpu, pessimistic=pessimistic)
    assert largest == (room - 100 * MIB) // (2 * MIB)
    assert fits(linear(largest), gpu, pessimistic=pessimistic)
    assert not fits(linear(largest + 1), gpu, pessimistic=pessimistic)


def test_the_room_is_what_neither_driver_nor_context_takes():
    """Nearly the 14.56 GiB that PyTorch names as a T4's capacity, of the 15 GiB that nvidia-smi shows."""
    room, context = room_on(T4), context_of(T4)
    assert (room.low + context.high) / 2**30 == pytest.approx(14.56, abs=0.02)
    assert room.high + context.low < T4.total * MIB
    told = dataclasses.replace(H100, kept=480)
    assert room_on(told) == Range(*((81_559 - 480) * MIB - end * MIB for end in (760, 742)))


def test_batches_below_the_least_are_not_tried():
    tried = []

    def account_of(batch: int) -> Account:
        tried.append(batch)
        return linear(2**20 if batch == 2 else batch)

    assert largest_batch(account_of, T4, pessimistic=True, least=2) == 0
    assert tried == [2]


def test_no_batch_fits_where_the_model_does_not():
    assert largest_batch(lambda batch: Account((change(0, 2**40),)), T4, pessimistic=False) == 0


def test_cached_segments_are_given_back_before_memory_runs_out():
    """What does not fit at once may fit after the allocator has let go of what it only keeps."""
    half = room_on(T4).low // 2
    account = Account((change(0, half + MIB), change(0, 0), change(1, half + 3 * MIB)))
    assert fits(account, T4, pessimistic=True)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_is_one_that_is_compiled_for(name):
    gpu = GPUS[name]
    assert gpu.arch in MULTIPROCESSORS
    assert gpu.arch in LIMITS
    assert gpu.total > context_of(gpu).high / MIB
