"""The accountant against storages that can be counted by hand."""

import pytest
import torch
from torch import nn

from bench.measure import tracker as accounts
from bench.measure.tracker import Tracker
from kernels import conv2d, runtime

KIB = 1024


def kib(n: int, device: str = "cpu") -> torch.Tensor:
    """A tensor of n KiB."""
    return torch.zeros(n * KIB // 4, device=device)


@pytest.fixture(params=["cpu", "meta"])
def device(request):
    return request.param


def test_views_are_not_counted_twice(device):
    with Tracker(device) as tracker:
        a = kib(8, device)
        views = [a.view(2, -1), a[10:], a.view(2, -1).T, a.detach()]
        assert tracker.now == 8 * KIB
        del a
        assert tracker.now == 8 * KIB
        del views
        assert tracker.now == 0
    assert tracker.peak == 8 * KIB


def test_freed_storages_leave_and_the_peak_stays(device):
    with Tracker(device) as tracker:
        a = kib(8, device)
        b = a + 1  # 16 KiB live
        del a
        c = b[: KIB // 4] * 2  # 9 KiB live
        assert tracker.now == 9 * KIB
        assert tracker.peak == 16 * KIB
        tracker.reset_peak()
        assert tracker.peak == 9 * KIB
        d = c + c
        assert tracker.peak == tracker.now == 10 * KIB
    del b, d


def test_in_place_operations_take_nothing(device):
    a = kib(8, device)
    with Tracker(device) as tracker:
        a.add_(1).relu_()
        a[5:].fill_(2)
        assert tracker.peak == 8 * KIB
    assert tracker.by_category[accounts.INPUT] == 8 * KIB


def test_other_devices_are_not_counted():
    with Tracker("meta") as tracker:
        a = kib(8, "cpu")
        b = kib(4, "meta")
        assert tracker.now == 4 * KIB
    del a, b


def test_a_resized_storage_is_recounted():
    with Tracker("cpu") as tracker:
        a = kib(8)
        a.resize_(16 * KIB // 4)
        assert tracker.now == 16 * KIB
        del a
        assert tracker.now == 0


def test_saved_activations_are_told_from_temporaries(device):
    x = kib(8, device).requires_grad_()
    with Tracker(device) as tracker:
        y = x.exp()  # saves its result
        z = y + 1  # saves nothing
        assert tracker.by_category[accounts.SAVED] == 8 * KIB
        assert tracker.by_category[accounts.TEMPORARY] == 8 * KIB
        loss = z.sum()
        del y, z
        assert tracker.by_category[accounts.SAVED] == 8 * KIB
        loss.backward()
        assert tracker.by_category[accounts.SAVED] == 0
    assert x.grad is not None


@pytest.mark.parametrize("watched_first", [True, False], ids=["watched-before", "watched-inside"])
def test_a_training_step_by_category(device, watched_first):
    model = nn.Linear(64, 64, bias=False, device=device)  # 16 KiB
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.zeros(32, 64, device=device)  # 8 KiB
    tracker = Tracker(device)
    if watched_first:
        tracker.watch(model, optimizer)
    with tracker:
        if not watched_first:
            tracker.watch(model, optimizer)
        model(x).sum().backward()
        assert tracker.by_category[accounts.GRADIENTS] == 16 * KIB
        assert tracker.by_category[accounts.OPTIMIZER] == 0
        optimizer.step()
    live = {category: nbytes for category, nbytes in tracker.by_category.items() if nbytes}
    assert live == {
        accounts.PARAMETERS: 16 * KIB,
        accounts.GRADIENTS: 16 * KIB,
        accounts.OPTIMIZER: 16 * KIB,
        accounts.INPUT: 8 * KIB,
    }
    assert sum(tracker.at_peak.values()) == tracker.peak


def test_a_result_saved_at_the_peak_counts_as_saved(device):
    x = kib(8, device).requires_grad_()
    with Tracker(device) as tracker:
        y = x.exp()
    assert tracker.peak == 16 * KIB
    assert tracker.at_peak[accounts.SAVED] == 8 * KIB
    del y


def test_state_that_existed_before_is_counted(device):
    model = nn.Linear(64, 64, bias=False, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(1, 64, device=device)).sum().backward()
    optimizer.step()
    tracker = Tracker(device)
    tracker.watch(model, optimizer)
    assert tracker.now == 3 * 16 * KIB


def test_hooks_are_gone_after_the_context():
    model = nn.Linear(64, 64, bias=False)
    tracker = Tracker("cpu")
    tracker.watch(model)
    with tracker:
        pass
    before = tracker.now
    model(torch.zeros(1, 64)).sum().backward()
    assert tracker.now == before


def test_launcher_buffers_are_seen():
    """A dispatch mode cannot look inside an operator; a buffer taken there must show up all the same."""
    x, w = torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 1, 1)

    @torch.library.custom_op("conv_lab_tests::with_workspace", mutates_args=())
    def with_workspace(x: torch.Tensor) -> torch.Tensor:
        buffer = runtime.empty((64, KIB, KIB // 4), "buffer", dtype=x.dtype, device=x.device)
        return runtime.empty(tuple(x.shape), "output", dtype=x.dtype, device=x.device).copy_(buffer[0, 0, 0])

    with Tracker("cpu") as tracker:
        y = with_workspace(x)
        assert tracker.at_peak[accounts.WORKSPACE] >= 64 * KIB * KIB
        assert tracker.now == x.nbytes + y.nbytes
        assert tracker.by_category[accounts.TEMPORARY] == y.nbytes
        tracker.reset_peak()
        del y
        y = conv2d(x, w)  # both are contiguous, so the launcher copies them to channels-last
        assert tracker.at_peak[accounts.WORKSPACE] >= x.nbytes
        assert tracker.by_category[accounts.TEMPORARY] == y.nbytes


def test_fold_keeps_a_storage_as_large_as_its_argument(device):
    columns = torch.zeros(1, 9 * 4, 64, device=device)  # 9 KiB, folded to 1 KiB
    with Tracker(device) as tracker:
        x = nn.functional.fold(columns, 8, 3, padding=1)
        assert x.nbytes == KIB
        assert tracker.by_category[accounts.TEMPORARY] == 9 * KIB
        del x
        assert tracker.by_category[accounts.TEMPORARY] == 0
