"""The accountant against storages that can be counted by hand."""

import threading
from collections import Counter

import pytest
import torch
from storages import KIB, W, X, kib, net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import models
from bench.measure import account as accounts
from bench.measure.account import OUTSIDE, Change, Mark
from bench.measure.tracker import Tracker
from kernels import conv2d, runtime


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
        F.conv2d(torch.zeros(X), torch.zeros(W)).sum((0, 2, 3))
        torch.zeros(7, 6).sum(0)
        assert tracker.now == 4 * KIB
    assert [entry.nbytes for entry in tracker.account.entries] == [4 * KIB]
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
        loss = model(x).sum()
        assert tracker.by_category[accounts.INPUT] == 8 * KIB, "autograd keeps it, and it is the input all the same"
        loss.backward()
        del loss
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


class Block(nn.Module):
    """tanh(2 * linear(tanh(x))): a module used twice, a nested one, and code of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 64, bias=False))
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(self.act(x)) * 2)


FORWARD = [
    ("block.act", "aten.tanh"), ("block.inner.0", "aten.mm"), ("block", "aten.mul"), ("block.act", "aten.tanh"),
]  # fmt: skip
BACKWARD = [
    ("block.act", "aten.tanh_backward"), ("block", "aten.mul"),
    ("block.inner.0", "aten.mm"), ("block.inner.0", "aten.mm"),
    ("block.act", "aten.tanh_backward"),
]  # fmt: skip


def made(tracker: Tracker) -> list[tuple[str, str]]:
    """(module, operator) of each storage that an operator made, in order."""
    first = {}
    for entry in tracker.account.entries:
        if isinstance(entry, Change) and entry.operator:
            first.setdefault(entry.storage, (entry.module, entry.operator))
    return list(first.values())


def test_each_storage_is_the_innermost_modules_that_made_it(device):
    model = net(Block(), device)
    x = torch.zeros(2, 64, device=device, requires_grad=True)
    tracker = Tracker(device)
    tracker.watch(model)
    with tracker:
        y = model(x)
        assert made(tracker) == FORWARD
        assert tracker.account.moment(10**9).split("category", "module")[accounts.INPUT, OUTSIDE] == x.nbytes
        loss = y.sum() * 3
        tracker.reset_peak(forget=True)
        loss.backward(torch.ones_like(loss))
    backward = made(tracker)[-len(BACKWARD) - 1 :]
    assert backward == [(OUTSIDE, "aten.mul"), *BACKWARD]
    assert ("block.inner.0", accounts.GRADIENTS) in tracker.account.moment(10**9).split("module", "category")


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_a_checkpointed_module_makes_its_activations_twice(device, use_reentrant):
    model = net(Block(), device)
    x = torch.zeros(2, 64, device=device, requires_grad=True)
    tracker = Tracker(device)
    tracker.watch(model)
    with tracker:
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        assert made(tracker) == FORWARD
        assert tracker.now == 16 * KIB + x.nbytes + y.nbytes
        y.backward(torch.ones_like(y))
        z = x * 2
    ones = (OUTSIDE, "aten.ones_like")
    assert Counter(made(tracker)) == Counter([*FORWARD, ones, *FORWARD, *BACKWARD, (OUTSIDE, "aten.mul")])
    assert made(tracker)[-1] == (OUTSIDE, "aten.mul")
    del z


def test_what_a_modules_own_hooks_make_is_the_modules(device):
    model = net(nn.Tanh(), device)
    model.block.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    model.block.register_forward_hook(lambda _module, _args, y: y.exp())
    x = torch.zeros(2, device=device)
    tracker = Tracker(device)
    tracker.watch(model)
    with tracker:
        model(x)
    assert made(tracker) == [("block", "aten.mul"), ("block", "aten.tanh"), ("block", "aten.exp")]


def test_what_belongs_to_a_parameter_is_its_modules_wherever_it_is_used(device):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = nn.Linear(64, 64, bias=False), Other()
            self.scale = nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            return self.other(x, self.first.weight) * self.scale

    class Other(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return F.linear(x, w)

    model = Tied().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = Tracker(device)
    tracker.watch(model, optimizer)
    with tracker:
        model(torch.zeros(2, 64, device=device)).sum().backward()
        optimizer.step()
    live = tracker.account.moment(len(tracker.account.entries)).split("category", "module")
    assert live == {
        (category, module): nbytes
        for category in (accounts.PARAMETERS, accounts.GRADIENTS, accounts.OPTIMIZER)
        for module, nbytes in (("first", 16 * KIB), (OUTSIDE, 256))
    }


def test_a_forward_that_raises_ends_its_modules_all_the_same(device):
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("made to fail")

    model = net(nn.Sequential(Fails()), device)
    tracker = Tracker(device)
    tracker.watch(model)
    with tracker:
        with pytest.raises(RuntimeError, match="made to fail"):
            model(torch.zeros(2, device=device))
        kept = kib(1, device)
    assert made(tracker)[-1][0] == OUTSIDE
    del kept


def test_a_launchers_buffer_keeps_its_name_until_the_operator_returns_it():
    model = net(models.CONVOLUTIONS["triton"](4, 8, 1, bias=False), "cpu")
    tracker = Tracker("cpu")
    tracker.watch(model)
    with tracker:
        model(torch.zeros(1, 4, 8, 8)).sum()
    output = [entry for entry in tracker.account.entries if isinstance(entry, Change) and entry.nbytes == 8 * 64 * 4]
    assert [(entry.category, entry.module, entry.operator) for entry in output][:2] == [
        (accounts.WORKSPACE, "block", "output"), (accounts.TEMPORARY, "block", "conv_lab.forward"),
    ]  # fmt: skip
    assert ("block", "input as channels-last") in made(tracker)


def test_marks_end_phases_and_a_forgotten_beginning_leaves_what_is_live(device):
    with Tracker(device) as tracker:
        a = kib(8, device)
        b = kib(4, device)
        tracker.mark("first")
        del a
        c = kib(1, device)
        tracker.mark("second")
        phases = tracker.account.phases
        assert {name: (phase.peak.nbytes, phase.end.nbytes) for name, phase in phases.items()} == {
            "first": (12 * KIB, 12 * KIB), "second": (12 * KIB, 5 * KIB),
        }  # fmt: skip
        tracker.reset_peak()
        assert [entry.phase for entry in tracker.account.entries if isinstance(entry, Mark)] == ["first", "second"]
        tracker.reset_peak(forget=True)
        assert tracker.account.phases == {}
        assert [entry.nbytes for entry in tracker.account.entries] == [4 * KIB, KIB]
        assert tracker.account.start == 2
        del b
        assert (tracker.now, tracker.peak) == (KIB, 5 * KIB)
    del c


def test_a_device_with_a_number_is_that_one_alone():
    class OnGpu:
        """What _counts looks at, for there is no GPU here."""

        def __init__(self, index: int):
            self.device = torch.device("cuda", index)

    assert [Tracker("cuda:1")._counts(OnGpu(index)) for index in (0, 1)] == [False, True]
    assert [Tracker("cuda")._counts(OnGpu(index)) for index in (0, 1)] == [True, True]


def test_a_tracker_is_open_once():
    tracker = Tracker("cpu")
    with tracker, pytest.raises(RuntimeError, match="open already"):
        tracker.__enter__()
    before = tracker.now
    a = kib(8)
    assert tracker.now == before  # its mode is gone
    del a


def test_buffers_of_another_threads_launch_are_not_this_trackers():
    x, w = torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3)  # both are copied to channels-last
    thread = threading.Thread(target=conv2d, args=(x, w))
    with Tracker("cpu") as tracker:
        thread.start()
        thread.join()
        assert tracker.account.entries == ()
        conv2d(x, w)
        assert any(entry.category == accounts.WORKSPACE for entry in tracker.account.entries)


def test_a_saved_tensor_that_was_changed_in_place_is_an_error_as_without_a_tracker(device):
    def spoilt() -> None:
        y = torch.ones(4, device=device, requires_grad=True).exp()
        y.add_(1)
        y.sum().backward()

    with pytest.raises(RuntimeError, match=r"in-?place"):
        spoilt()
    with Tracker(device), pytest.raises(RuntimeError, match="changed in place: it is at version 1, expected 0"):
        spoilt()


def test_of_old_nodes_the_modules_are_forgotten(monkeypatch):
    monkeypatch.setattr("bench.measure.tracker.NODES", 20)
    model = net(Block(), "cpu")
    tracker = Tracker("cpu")
    tracker.watch(model)
    with tracker:
        for _ in range(30):
            tracker.reset_peak(forget=True)
            model(torch.zeros(4, 64)).sum().backward()
        assert len(tracker._modules.owners) <= 40
        assert {place for place, _ in made(tracker)} >= {"block.inner.0", "block.act"}
