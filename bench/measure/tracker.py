"""The accountant: every live storage of one device by category, module and operator, as an `Account`.

    tracker = Tracker("meta")
    tracker.watch(model, optimizer)
    with tracker:
        loss(model(x)).backward()
        tracker.mark("forward and backward")
        optimizer.step()
    tracker.account.peak.split("category", "module")

A storage is counted once, however many tensors view it, from the operator that made it until it is freed. Operators
are seen through a dispatch mode, frees through weak references, what autograd keeps through its saved-tensor hooks,
and the buffers of Triton launchers, which no mode sees, through `kernels.runtime.on_allocate`.

Counted are bytes of storages. Not counted: what an allocator rounds up or keeps, what a library (cuDNN, oneDNN) or
Triton's interpreter takes inside one operator and returns, the CUDA context, storages of other devices, and operators
of other threads than the one that opened the tracker and autograd's for it. What a checkpoint recomputes counts as
temporary, for its own hooks stand in front of the tracker's.
"""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench.measure.account import (
    CATEGORIES,
    GRADIENTS,
    INPUT,
    OPTIMIZER,
    OUTSIDE,
    PARAMETERS,
    SAVED,
    TEMPORARY,
    WORKSPACE,
    Account,
    Change,
    Entry,
    Mark,
)
from bench.measure.operators import adds_up_gradients, calls, scratch, unseen_bytes
from kernels import runtime

NODES = 100_000
"""Of so many of autograd's nodes the modules are kept at least: several steps of the largest models."""


class _Storage:
    """One live storage."""

    __slots__ = ("category", "entered", "module", "nbytes", "number", "operator", "reference", "saved", "unseen")

    def __init__(self, number: int, category: str, module: str, operator: str, unseen: int) -> None:
        self.number = number
        self.category, self.module, self.operator = category, module, operator
        self.nbytes = 0
        self.entered: Change | None = None
        """What the account says of it."""
        self.unseen = unseen
        """Bytes that the kernel of a real device would take beyond those of this meta storage."""
        self.saved = 0
        """How often autograd keeps it."""
        self.reference: weakref.ref | None = None

    @property
    def counts_as(self) -> str:
        return SAVED if self.saved and self.category == TEMPORARY else self.category


class _Saved:
    """A tensor that autograd keeps; the storage counts as saved for as long as this object lives."""

    __slots__ = ("storage", "tensor", "tracker", "version")

    def __init__(self, tracker: "Tracker", tensor: torch.Tensor) -> None:
        self.tracker, self.tensor, self.version = tracker, tensor, tensor._version
        self.storage = tracker._keep(tensor)

    def __del__(self) -> None:
        self.tracker._release(self.storage)


class _Operators(TorchDispatchMode):
    """Shows the tracker each operator's tensors."""

    def __init__(self, tracker: "Tracker") -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tracker = self.tracker
        tracker._settle()
        for tensor in _tensors((args, kwargs)):
            tracker._see(tensor, INPUT)
        tracker._thread = threading.get_ident()
        try:
            result = func(*args, **kwargs)
        finally:
            tracker._thread = None
        operator = func._schema.name.replace("::", ".")
        if adds_up_gradients(func, args, result):
            tracker._see_sum(args[0], result, operator)
            return result
        for tensor in _tensors(result):
            if tracker._counts(tensor):
                tracker._entries.extend(scratch(operator, tracker._module(), args, tensor))
                tracker._see(tensor, TEMPORARY, operator, unseen_bytes(func, args, tensor))
                tracker._entries.extend(calls(operator, tracker._module(), args, tensor))
        return result


class _Modules:
    """Which module made what: the one whose forward runs, or the one in whose forward a backward node was made.

    autograd numbers its nodes in the order they are made, so a module owns the numbers given while its forward ran.
    """

    def __init__(self) -> None:
        self.running: list[tuple[str, int]] = []
        self.owners: dict[int, str] = {}

    def attach(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        """By hooks on whatever module runs: one of a module's own would make a fused model run unfused.

        A module that has hooks already gets its own, since what they make is the module's too: they run after all that
        are on every module.
        """
        names = {module: name for name, module in model.named_modules()}
        hooked = [module for module in names if module._forward_hooks]

        def begin(module: nn.Module, _args: tuple) -> None:
            if module in names:
                self._begin(names[module])

        def end(module: nn.Module, *_: object) -> None:
            if module in names and module not in hooked:
                self._end()

        stack.callback(register_module_forward_pre_hook(begin).remove)
        stack.callback(register_module_forward_hook(end, always_call=True).remove)
        for module in hooked:
            stack.callback(module.register_forward_hook(lambda *_: self._end(), always_call=True).remove)

    def current(self) -> str:
        if self.running:
            return self.running[-1][0] or OUTSIDE
        node = torch._C._current_autograd_node()
        return OUTSIDE if node is None else self.owners.get(node._sequence_nr(), OUTSIDE)

    def _begin(self, name: str) -> None:
        self.running.append((name, torch._C._autograd._get_sequence_nr()))

    def _end(self) -> None:
        name, first = self.running.pop()
        for number in range(first, torch._C._autograd._get_sequence_nr()):
            self.owners.setdefault(number, name or OUTSIDE)  # inner modules end before outer ones
        if not self.running and len(self.owners) > 2 * NODES:
            for number in list(self.owners)[:-NODES]:
                del self.owners[number]


def _tensors(tree: object) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


class Tracker:
    """Counts the storages of `device` while it is open as a context; see the module's docstring.

    `now` is bytes, and `by_category` splits it over CATEGORIES.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.now = 0
        self.by_category = dict.fromkeys(CATEGORIES, 0)
        self._entries: list[Entry] = []
        self._start = 0
        self._numbers = itertools.count()
        self._live: dict[int, _Storage] = {}
        self._sum: tuple[_Storage, _Storage] | None = None
        """An earlier gradient, and the sum with it that takes its place if it is freed at once."""
        self._watched: list[tuple[nn.Module, torch.optim.Optimizer | None]] = []
        self._paths: dict[torch.Tensor, str] = {}
        self._modules = _Modules()
        self._open: contextlib.ExitStack | None = None
        self._thread: int | None = None
        """Whose operator runs just now, and so whose launchers' buffers are this tracker's."""

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Counts the model's parameters, buffers and gradients, and the optimizer's state, as what they are.

        Whatever the model's modules make is then counted as theirs.
        """
        for path, module in model.named_modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._paths.setdefault(tensor, path or OUTSIDE)
                self._label(tensor, PARAMETERS, self._paths[tensor])
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._label(parameter.grad, GRADIENTS, self._paths[parameter])
        if optimizer is not None:
            self._label_state(optimizer)
        self._watched.append((model, optimizer))
        if self._open is not None:
            self._attach(model, optimizer, self._open)

    def label(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Counts the storages of `tensors` as `category` from now on."""
        for tensor in tensors:
            self._label(tensor, category, None)

    def mark(self, phase: str) -> None:
        """Says that what was done since the mark before, or since the beginning, is called `phase`."""
        self._settle()
        self._entries.append(Mark(phase))

    def reset_peak(self, *, forget: bool = False) -> None:
        """Begins the step that counts at what is live now; with `forget` the entries before are dropped."""
        self._settle()
        if forget:
            self._entries = [record.entered for record in self._live.values() if record.nbytes]
        self._start = len(self._entries)

    @property
    def account(self) -> Account:
        """Everything seen so far."""
        self._settle()
        return Account(tuple(self._entries), self._start)

    @property
    def peak(self) -> int:
        """Bytes at the highest moment since `reset_peak`, or since the beginning."""
        return self.account.peak.nbytes

    @property
    def at_peak(self) -> dict[str, int]:
        """Those by category."""
        return self.account.peak.by_category()

    def __enter__(self) -> "Tracker":
        """Raises RuntimeError if it is open already."""
        if self._open is not None:
            raise RuntimeError("this Tracker is open already")
        with contextlib.ExitStack() as opening:
            for model, optimizer in self._watched:
                self._attach(model, optimizer, opening)
            opening.enter_context(runtime.on_allocate(self._workspace_taken))
            opening.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
            opening.enter_context(_Operators(self))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
        self._open = None

    def _attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, stack: contextlib.ExitStack
    ) -> None:
        """Hooks that tell who makes what, and what gradients and optimizer state are, until `stack` closes."""
        self._modules.attach(model, stack)
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._gradient_made).remove)
        if optimizer is not None:
            stack.callback(optimizer.register_step_post_hook(self._optimizer_stepped).remove)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        return _Saved(self, tensor)

    def _gradient_made(self, parameter: nn.Parameter) -> None:
        self._label(parameter.grad, GRADIENTS, self._paths.get(parameter))

    def _optimizer_stepped(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._label_state(optimizer)

    def _label_state(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for tensor in _tensors(state):
                self._label(tensor, OPTIMIZER, self._paths.get(parameter))

    def _workspace_taken(self, nbytes: int, what: str, tensor: torch.Tensor) -> None:
        if threading.get_ident() == self._thread:
            self._see(tensor, WORKSPACE, what)

    def _counts(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies on the device: on any of its type, unless it was named with a number."""
        theirs, ours = tensor.device, self.device
        return theirs.type == ours.type and ours.index in (None, theirs.index)

    def _module(self) -> str:
        return self._modules.current()

    def _label(self, tensor: torch.Tensor, category: str, module: str | None) -> None:
        record = self._see(tensor, category)
        if record is not None:
            if module is not None:
                record.module = module
            record.category = category
            self._recount(record)

    def _see(
        self, tensor: torch.Tensor, category: str, operator: str = "", unseen: int = 0
    ) -> _Storage | None:
        """The record of a tensor's storage, made as `category` if it is new; None for other devices' tensors."""
        if not self._counts(tensor):
            return None
        storage = tensor.untyped_storage()
        record = self._live.get(storage._cdata)
        if record is None:
            module = self._module() if operator else OUTSIDE
            record = self._new(storage, _Storage(next(self._numbers), category, module, operator, unseen))
        elif record.category == WORKSPACE and category == TEMPORARY:
            record.category, record.operator = TEMPORARY, operator
        self._recount(record, storage.nbytes() + record.unseen)
        return record

    def _new(self, storage: torch.UntypedStorage, record: _Storage) -> _Storage:
        self._live[storage._cdata] = record
        record.reference = weakref.ref(storage, lambda _, key=storage._cdata: self._freed(key))
        return record

    def _keep(self, tensor: torch.Tensor) -> _Storage | None:
        record = self._see(tensor, INPUT)
        if record is not None:
            record.saved += 1
            self._recount(record)
        return record

    def _release(self, record: _Storage | None) -> None:
        if record is not None:
            record.saved -= 1
            self._recount(record)

    def _see_sum(self, earlier: torch.Tensor, total: torch.Tensor, operator: str) -> None:
        """Takes `total` for the storage of `earlier` where that is freed before the next operator."""
        before = self._see(earlier, INPUT)
        if before is None:
            return
        storage = total.untyped_storage()
        record = self._new(storage, _Storage(next(self._numbers), TEMPORARY, self._module(), operator, 0))
        record.nbytes = storage.nbytes()
        self._sum = (before, record)

    def _settle(self) -> None:
        """What was not freed at once is still there beside the sum."""
        if self._sum is not None:
            _, record = self._sum
            self._sum = None
            self._recount(record, record.nbytes)

    def _freed(self, key: int) -> None:
        if self._sum is not None and self._live[key] not in self._sum:
            self._settle()  # a term of the sum goes before the earlier gradient does, which therefore stays
        freed = self._live.pop(key)
        if self._sum is not None and freed is self._sum[0]:
            record = self._sum[1]
            self._sum = None
            record.number, record.entered = freed.number, freed.entered
            self._recount(record, record.nbytes)
            return
        self._recount(freed, 0)

    def _change(self, record: _Storage) -> Change:
        return Change(record.number, record.nbytes, record.counts_as, record.module, record.operator)

    def _recount(self, record: _Storage, nbytes: int | None = None) -> None:
        """Brings the totals up to what a record is by now, and enters the change if it is one."""
        before = record.entered
        if nbytes is not None:
            record.nbytes = nbytes
        now = self._change(record)
        if now == before or not (now.nbytes or (before and before.nbytes)):
            return
        if before is not None:
            self.by_category[before.category] -= before.nbytes
            self.now -= before.nbytes
        self.by_category[now.category] += now.nbytes
        self.now += now.nbytes
        record.entered = now
        self._entries.append(now)


def _unpack(saved: _Saved) -> torch.Tensor:
    # Which autograd checks itself only of what no hook packed.
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            f"a tensor of shape {tuple(saved.tensor.shape)} that the backward pass needs was changed in place: "
            f"it is at version {saved.tensor._version}, expected {saved.version}"
        )
    return saved.tensor
