"""The accountant: every live storage of one device by category; bytes now, at the peak, and what the peak is made of.

    tracker = Tracker(torch.device("meta"))
    tracker.watch(model, optimizer)
    with tracker:
        loss(model(x)).backward()
        optimizer.step()
    tracker.peak, tracker.at_peak

A storage is counted once, however many tensors view it, from the operator that made it until it is freed. Operators
are seen through a dispatch mode, frees through weak references, what autograd keeps through its saved-tensor hooks,
and the buffers of Triton launchers, which no mode sees, through `kernels.runtime.on_allocate`.

Counted are bytes of storages. Not counted: what an allocator rounds up or keeps, what a library (cuDNN, oneDNN)
takes inside one operator and returns, the CUDA context, and storages of other devices.
"""

import contextlib
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kernels import runtime

PARAMETERS = "parameters"
"""Parameters and buffers of a watched model."""
GRADIENTS = "gradients"
"""What `.grad` of a watched parameter holds."""
OPTIMIZER = "optimizer state"
INPUT = "input"
"""Whatever the tracked computation reads and did not make: the batch, its labels."""
SAVED = "saved for backward"
"""Activations that autograd keeps at that moment."""
TEMPORARY = "temporaries"
"""Everything else an operator returned, gradients of activations among them."""
WORKSPACE = "workspaces"
"""Buffers that a launcher takes inside an operator, until the operator returns them as its result."""
CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER, INPUT, SAVED, TEMPORARY, WORKSPACE)


class _Storage:
    """One live storage."""

    __slots__ = ("category", "nbytes", "reference", "saved", "unseen")

    def __init__(self, category: str, unseen: int) -> None:
        self.category = category
        self.nbytes = 0
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

    __slots__ = ("storage", "tensor", "tracker")

    def __init__(self, tracker: "Tracker", tensor: torch.Tensor) -> None:
        self.tracker, self.tensor = tracker, tensor
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
        for tensor in _tensors((args, kwargs)):
            self.tracker._see(tensor, INPUT)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self.tracker._see(tensor, TEMPORARY, _unseen_bytes(func, args, tensor))
        return result


def _tensors(tree: object) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def _unseen_bytes(func: torch._ops.OpOverload, args: tuple, result: torch.Tensor) -> int:
    """Bytes by which a real device's result is larger than its meta twin.

    `fold` alone: its CPU and CUDA kernels first take a result as large as their argument, then shrink its shape only.
    """
    if func is torch.ops.aten.col2im.default and result.is_meta:
        return args[0].numel() * args[0].element_size() - result.untyped_storage().nbytes()
    return 0


class Tracker:
    """Counts the storages of `device` while it is open as a context; see the module's docstring.

    `now`, `peak` are bytes; `by_category`, `at_peak` split them over CATEGORIES.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.now = 0
        self.by_category = dict.fromkeys(CATEGORIES, 0)
        self.peak = 0
        self.at_peak = dict(self.by_category)
        self._live: dict[int, _Storage] = {}
        self._watched: list[tuple[nn.Module, torch.optim.Optimizer | None]] = []
        self._open: contextlib.ExitStack | None = None

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Counts the model's parameters, buffers and gradients, and the optimizer's state, as what they are."""
        self.label((*model.parameters(), *model.buffers()), PARAMETERS)
        self.label((p.grad for p in model.parameters() if p.grad is not None), GRADIENTS)
        if optimizer is not None:
            self.label(_tensors(dict(optimizer.state)), OPTIMIZER)
        self._watched.append((model, optimizer))
        if self._open is not None:
            self._attach(model, optimizer, self._open)

    def label(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Counts the storages of `tensors` as `category` from now on."""
        for tensor in tensors:
            storage = self._see(tensor, category)
            if storage is not None:
                self._recount(storage, category=category)

    def reset_peak(self) -> None:
        """Begins a new peak at what is live now."""
        self.peak, self.at_peak = self.now, dict(self.by_category)

    def __enter__(self) -> "Tracker":
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
        """Hooks that tell what gradients and optimizer state are, until `stack` closes."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._gradient_made).remove)
        if optimizer is not None:
            stack.callback(optimizer.register_step_post_hook(self._optimizer_stepped).remove)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        return _Saved(self, tensor)

    def _gradient_made(self, parameter: nn.Parameter) -> None:
        self.label((parameter.grad,), GRADIENTS)

    def _optimizer_stepped(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.label(_tensors(dict(optimizer.state)), OPTIMIZER)

    def _workspace_taken(self, nbytes: int, what: str, tensor: torch.Tensor) -> None:
        self._see(tensor, WORKSPACE)

    def _see(self, tensor: torch.Tensor, category: str, unseen: int = 0) -> _Storage | None:
        """The record of a tensor's storage, made as `category` if it is new; None for other devices' tensors."""
        if tensor.device.type != self.device.type:
            return None
        storage = tensor.untyped_storage()
        record = self._live.get(storage._cdata)
        if record is None:
            record = self._live[storage._cdata] = _Storage(category, unseen)
            record.reference = weakref.ref(storage, lambda _, key=storage._cdata: self._freed(key))
        if record.category == WORKSPACE and category == TEMPORARY:
            self._recount(record, category=TEMPORARY)
        self._recount(record, nbytes=storage.nbytes() + record.unseen)
        return record

    def _keep(self, tensor: torch.Tensor) -> _Storage | None:
        record = self._see(tensor, INPUT)
        if record is not None:
            self._recount(record, saved=record.saved + 1)
        return record

    def _release(self, record: _Storage | None) -> None:
        if record is not None:
            self._recount(record, saved=record.saved - 1)

    def _freed(self, key: int) -> None:
        self._recount(self._live.pop(key), nbytes=0)

    def _recount(
        self,
        record: _Storage,
        *,
        category: str | None = None,
        nbytes: int | None = None,
        saved: int | None = None,
    ) -> None:
        """Changes a record and every total it is part of."""
        before = record.counts_as
        self.by_category[before] -= record.nbytes
        self.now -= record.nbytes
        if category is not None:
            record.category = category
        if nbytes is not None:
            record.nbytes = nbytes
        if saved is not None:
            record.saved = saved
        self.by_category[record.counts_as] += record.nbytes
        self.now += record.nbytes
        # What a storage is for is often known only after it was made (a result that autograd then saves), so while
        # the peak lasts it is counted as what it turned out to be, though not as what it is no longer.
        turned_out = before in (TEMPORARY, WORKSPACE) and record.counts_as != before
        if self.now > self.peak or (self.now == self.peak and turned_out):
            self.peak, self.at_peak = self.now, dict(self.by_category)


def _unpack(saved: _Saved) -> torch.Tensor:
    return saved.tensor
