"""Turns a module's forward into a graph, and raises `Untraceable` where the graph would lose something that it does.

Nothing runs and nothing stays changed: whatever a forward did to its modules or to a random generator is taken back.
"""

import inspect
import operator
import random
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.fusion.region import copied, is_intercepted, is_same

_DEVICES = "cpu", "cuda"
# Of what every module has, a forward may decide by its mode; the rest is machinery.
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}


class Untraceable(Exception):
    """What a forward does that a trace would lose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A forward as a graph, and what the graph depends on."""

    graph: fx.Graph
    inlined: set[nn.Module]
    """Modules that the graph looks into."""
    reads: dict[tuple[nn.Module, str], Any]
    """Attributes by which the forward may have decided."""


def traces_of(root: nn.Module, parts: set[nn.Module]) -> tuple[list[Trace], dict[nn.Module, str]]:
    """Traces of `root`: one, or one for training and one for evaluation where it asks for the mode.

    Modules without any of `parts` in them become calls, and so do those, returned with the reason, that a trace cannot
    look into; what one trace cannot look into is a call in all of them.
    """
    opaque: dict[nn.Module, str] = {}
    while True:
        known = len(opaque)
        pairs = [_pair(root, parts, opaque, training=True)]
        if any(name == "training" for _, name in pairs[0][0].reads):
            pairs.append(_pair(root, parts, opaque, training=False))
        if len(opaque) == known:
            break
    for usual, other in pairs:
        if usual.graph.python_code("self").src != other.graph.python_code("self").src:
            raise Untraceable("asks whether gradients or autocast are on")
    return [usual for usual, _ in pairs], opaque


def has_any(module: nn.Module, parts: set[nn.Module]) -> bool:
    """Whether there may be something to fuse inside: a program calls other modules as they are."""
    return not parts.isdisjoint(module.modules())


def why_not_traced(module: nn.Module) -> str | None:
    """Why a module must keep its class and its forward; None if it need not."""
    cls = type(module)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule, LazyModuleMixin)) or is_parametrized(module):
        return f"is a {cls.__name__}"
    if "forward" in vars(module):
        return "its forward is replaced"
    if cls.__call__ is not nn.Module.__call__:
        return "has a __call__ of its own"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "is pickled in a way of its own"
    if cls.__module__.startswith("torch.nn.") and cls is not nn.Sequential:
        return f"is a {cls.__name__}"
    return None


def in_words(error: Exception) -> str:
    """The reason that a trace failed, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"cannot be traced: {textwrap.shorten(text, 110, placeholder='...')}"


def _pair(
    root: nn.Module, parts: set[nn.Module], opaque: dict[nn.Module, str], *, training: bool
) -> tuple[Trace, Trace]:
    """Two traces of `root` with all of its modules in one mode; adds to `opaque`.

    Whatever a forward asks for or switches, of gradients and autocast, is the other way in one of the two.
    """
    modes = {module: module.training for module in root.modules()}
    try:
        for module in modes:
            module.training = training
        return (
            _trace(root, parts, opaque, grad=True, autocast=False),
            _trace(root, parts, opaque, grad=False, autocast=True),
        )
    finally:
        for module, mode in modes.items():
            module.training = mode


def _trace(
    root: nn.Module, parts: set[nn.Module], opaque: dict[nn.Module, str], *, grad: bool, autocast: bool
) -> Trace:
    with torch.set_grad_enabled(grad), _autocast(autocast):
        tracer = _Tracer(parts, opaque)
        try:
            return Trace(graph=tracer.trace(root), inlined=tracer.inlined, reads=tracer.reads)
        finally:
            vars(tracer).clear()  # it is part of cycles, which would keep the model until they are collected


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """Only says that autocast is on or off: entering it would ask for devices that may not be there."""
    before = {device: torch.is_autocast_enabled(device) for device in _DEVICES}
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, enabled)
        yield
    finally:
        for device, was in before.items():
            torch.set_autocast_enabled(device, was)


class _Proxy(fx.Proxy):
    """A value in a trace. `isinstance` of one would be false for a tensor, and the trace would go the wrong way.

    It must not pretend to be a tensor either: C++ believes `__class__` too, and reads memory that is not there.
    """

    @property
    def __class__(self) -> type:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return _Proxy
        raise Untraceable("asks for the type of a value")

    def __getattr__(self, name: str) -> fx.Proxy:
        """What a tensor lacks, a value lacks too: `hasattr` of a proxy would be true of anything."""
        if not hasattr(torch.Tensor, name):
            raise AttributeError(f"a value of a trace has no {name}")
        return super().__getattr__(name)


def _in_place(function: Callable) -> Callable:
    return lambda value, other: value.tracer.create_proxy("call_function", function, (value, other), {})


# fx would record x += y as x = x + y, and whoever else holds x would keep its old value.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Tracer(fx.Tracer):
    """Traces a module, with containers inlined that hold what can be fused; where one cannot be, it becomes a call."""

    proxy_buffer_attributes = True  # or x - self.mean would read a buffer's value of today

    def __init__(self, parts: set[nn.Module], opaque: dict[nn.Module, str]):
        super().__init__()
        self.parts, self.opaque = parts, opaque
        self.inlined: set[nn.Module] = set()
        self.reads: dict[tuple[nn.Module, str], Any] = {}
        self.ambient = _ambient()

    def trace(self, root: nn.Module) -> fx.Graph:
        before = {module: _attributes(module) for module in root.modules()}
        try:
            with _NothingComputed(), _nothing_drawn(), self._reads_recorded():
                graph = super().trace(root)
        finally:
            changed = [name for module, attributes in before.items() for name in _restore(module, attributes)]
        if changed:
            raise _sets(changed[0])
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        return graph

    @contextmanager
    def _reads_recorded(self) -> Iterator[None]:
        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name not in _MACHINERY and name in object.__getattribute__(module, "__dict__"):
                self.reads.setdefault((module, name), value)
            return value

        nn.Module.__getattribute__ = read
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(m)  # raises for one that is kept in a list, say: it would have no name in a program
        if m not in self.parts and m not in self.opaque and has_any(m, self.parts):
            reason = _why_not_inlined(m)
            if reason is None:
                try:
                    return self._inline(m, forward, args, kwargs)
                except Exception as error:  # noqa: BLE001  a forward on proxies may raise anything
                    reason = in_words(error)
            self.opaque[m] = reason
        return self.create_proxy("call_module", path, args, kwargs)

    def _inline(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Traces into a module; leaves no trace of it where that fails."""
        before, inlined = _attributes(m), set(self.inlined)
        last = next(iter(reversed(self.graph.nodes)), None)
        try:
            with _nothing_drawn():
                result = forward(*args, **kwargs)
            if changed := _restore(m, before):
                raise _sets(changed[0])
        except Exception:
            _restore(m, before)
            self.inlined = inlined
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                if node.op != "get_attr":  # those are remembered for the next reader
                    self.graph.erase_node(node)
            raise
        self.inlined.add(m)
        return result

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        """Tensors for the arguments that every call gives; the others keep their defaults."""
        args = [self.root]
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.default is parameter.empty and parameter.kind <= parameter.POSITIONAL_OR_KEYWORD:
                args.append(self.create_proxy("placeholder", parameter.name, (), {}))
        return root_fn, args

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if type(a) is OrderedDict:  # fx would make it a dict, and a list of any list
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        if isinstance(a, (dict, list)) and type(a) not in (dict, list):
            raise Untraceable(f"makes a {type(a).__name__}")
        return super().create_arg(a)

    def get_fresh_qualname(self, prefix: str) -> str:
        """Asked for by fx to make a tensor that is none of the module's own an attribute of it."""
        raise Untraceable("uses a value that is none of its parameters or buffers")

    def create_node(self, kind: str, target: Any, args: tuple, kwargs: dict, name=None, type_expr=None) -> fx.Node:
        if _ambient() != self.ambient:
            raise Untraceable("switches gradients or autocast on or off while it runs")
        return super().create_node(kind, target, args, kwargs, name)  # types would have to be importable


class _NothingComputed(TorchDispatchMode):
    """Nothing is computed in a trace: a value that does not depend on the input would be frozen, a random one too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise Untraceable(f"computes {func} of no input")


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Raises Untraceable if the block draws from Python's or NumPy's generator, and takes it back."""
    before, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002  the generator that others draw from
    try:
        yield
    finally:
        now = np.random.get_state()  # noqa: NPY002
        if random.getstate() != before or now[2:] != numpys[2:] or (now[1] != numpys[1]).any():
            random.setstate(before)
            np.random.set_state(numpys)  # noqa: NPY002
            raise Untraceable("draws random numbers")


def _ambient() -> tuple:
    """What a forward may switch for a while and a trace does not record. Inference mode switches gradients too."""
    return (
        torch.is_grad_enabled(),
        *(torch.is_autocast_enabled(device) for device in _DEVICES),
        *(torch.get_autocast_dtype(device) for device in _DEVICES),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # activation checkpointing, for one
    )


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and its value as `is_same` may compare it with the attribute's."""
    return {name: (value, copied(value)) for name, value in vars(module).items()}


def _restore(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> list[str]:
    """Undoes changes since `_attributes`; returns the names of what had changed."""
    now, changed = vars(module), []
    for name in [name for name in now if name not in before]:
        changed.append(name)
        del now[name]
    for name, (value, content) in before.items():
        if name not in now or now[name] is not value:
            changed.append(name)
            now[name] = value
        if not is_same(value, content):  # changed in place
            changed.append(name)
            value.clear()
            (value.extend if type(value) is list else value.update)(content)
    return changed


def _sets(name: str) -> Untraceable:
    names = {"_buffers": "a buffer", "_parameters": "a parameter", "_modules": "a child"}
    return Untraceable(f"sets {names.get(name, name)} while it runs")


def _why_not_inlined(module: nn.Module) -> str | None:
    if module._compiled_call_impl is not None:
        return "is compiled"
    return why_not_traced(module) or ("has hooks" if is_intercepted(module) else None)
