"""fuse(): makes the chains convolution, batch norm, ReLU, max-pool of a model that exists run as fused operators.

    convolution, [norm,] ReLU            conv(x, norm=norm, relu=True)
    convolution, norm                    conv(x, norm=norm)
    [convolution, [norm,]] ReLU, pool    pool(conv(x, norm=norm), relu=True): nobody keeps the tensor before the pool
    pool                                 pool(x): keeps a uint8 index instead of the input and an int64 index

Chains reach across containers, so they are looked for in *regions*: modules whose whole forward `torch.fx` can trace. A
region's module gets a subclass of its class whose forward runs the traced program with its chains rewritten. A trace
freezes what the forward decided in Python; whatever of that can change is compared before each run, and where it has
changed, the module's own forward runs instead. So a hook, a replaced child or an attribute set later does what it did.
"""

import copy
import dataclasses
import functools
import inspect
import operator
import random
import sys
import textwrap
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.conv2d import Conv2d
from kernels.max_pool2d import MaxPool2d, max_pool2d


def fuse(model: nn.Module) -> nn.Module:
    """Fuses every chain of the table above in a model, in place; returns the model. `fusion(model)` tells what became.

    Outputs and gradients stay the same, to within rounding, in training and evaluation. Modules stay the objects they
    are, with their names, parameters and state_dict; every plain nn.MaxPool2d becomes a `MaxPool2d`, and a module whose
    forward is rewritten gets a subclass of its class with the same name. Nothing runs, and no mode or buffer changes.

    Only our convolutions take part: `swap_conv2d` first. Fuse before `torch.compile` and data-parallel wrappers; fuse
    again after changing the model's structure, or the parts that changed run unfused. What a forward does besides
    computing its result (printing, counting in a global) happens unfused only. While this runs, no other thread may
    call modules: tracing replaces methods of nn.Module.
    """
    found = _analyse(model)
    for module in list(model.modules()):
        _unfuse(module)
        if type(module) is nn.MaxPool2d and _kind_of_module(module) == "pool":
            module.__class__ = MaxPool2d
    for module, region in found.regions.items():
        _refuse(module, region)
    return model


def fusion(model: nn.Module) -> "Fusion":
    """What `fuse` makes, or has made, of a model's chains, and what it leaves alone and why. Changes nothing."""
    found = _analyse(model)
    return Fusion(chains=tuple(found.chains), left=tuple(found.left.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fusion:
    """The report on a model; `str()` of it is to be read, in lines of 100 columns."""

    chains: tuple[tuple[str, str], ...]
    """What is fused, such as ("block1.0 + block1.1 + block2.0", "convolution; ReLU + max-pool"): operators by ";"."""
    left: tuple[tuple[str, str], ...]
    """What is not, such as ("block1.2", "batch norm follows the ReLU"): a place and the reason."""

    def __str__(self) -> str:
        chains = [(_shortened(names), became) for names, became in self.chains]
        width = max((len(names) for names, _ in chains), default=0)
        lines = [f"fused, {len(chains)}:", *(f"{names:{min(width, 60)}}  {became}" for names, became in chains)]
        places: dict[str, list[str]] = {}
        for place, reason in self.left:
            places.setdefault(reason, []).append(place)
        if places:
            lines.append(f"left as they were, {len(self.left)}:")
        lines += [f"{', '.join(names)}: {reason}" for reason, names in places.items()]
        return "\n".join(_wrapped(line) for line in lines)


def _shortened(names: str) -> str:
    """What the names of one chain begin with once: "layer1.0: conv1 + bn1"."""
    parts = names.split(" + ")
    parent = parts[0].rpartition(".")[0]
    if len(parts) == 1 or not parent or not all(part.startswith(f"{parent}.") for part in parts):
        return names
    return f"{parent}: {' + '.join(part.removeprefix(f'{parent}.') for part in parts)}"


def _wrapped(line: str) -> str:
    if line.endswith(":"):
        return line
    if len(line) <= 98:
        return f"  {line}"  # columns stay columns
    return textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ")


# --- the call ---------------------------------------------------------------------------------------------------------


class _Fused:
    """Mixed into the class of a region's module; `_fused` is the module's region, None in an object made otherwise."""

    _base: type[nn.Module]
    _fused: "_Region | None" = None

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickles by the name of the base class: no module holds this one's."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self._base,), *state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if vars(self).get("_fused", _MISSING) is None:  # unpickled: its classes' sources may have changed meanwhile
            fuse(self)


def _unfuse(module: nn.Module) -> "_Region | None":
    """Gives a module its own class back; returns its region."""
    if not isinstance(module, _Fused):
        return None
    region = vars(module).pop("_fused", None)
    module.__class__ = module._base
    return region


def _refuse(module: nn.Module, region: "_Region | None") -> None:
    module.__class__ = _fused_class(type(module))
    module._fused = region


def _new(base: type[nn.Module]) -> nn.Module:
    cls = _fused_class(base)
    return cls.__new__(cls)


@functools.cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        program = None if self._fused is None else self._fused.program(self, args, kwargs)
        return base.forward(self, *args, **kwargs) if program is None else program(self, *args, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_Fused, base), names | {"_base": base, "forward": forward})


@dataclass(frozen=True, eq=False, slots=True)
class _Program:
    run: Callable[..., Any]
    """run(module, *tensors)."""
    guards: tuple[tuple[nn.Module | None, str, Any], ...]
    """Attributes that the forward read while it was traced: of a module, None for the region's own, name and value."""


@dataclass(frozen=True, eq=False, slots=True)
class _Region:
    """What a region's module runs, and what must be as it was for that."""

    programs: tuple[_Program, ...]
    """One, or one for each mode where the forward asks for the mode."""
    arity: int
    """How many tensors the programs take. With more, an optional argument is given, and they know its default alone."""
    children: "_Children"
    """The children of the region's own module."""
    containers: tuple[tuple[nn.Module, "_Children"], ...]
    """The other modules that the programs look into, and their children."""
    bypassed: tuple[nn.Module, ...]
    """Modules that the programs do not call, or not as the forward does: a hook on them would see something else."""

    def program(self, module: nn.Module, args: tuple, kwargs: dict) -> Callable[..., Any] | None:
        """The program to run on these arguments; None if the module must run its own forward."""
        if len(args) + len(kwargs) != self.arity:
            return None
        for value in (*args, *kwargs.values()):
            if not isinstance(value, Tensor):
                return None
        if not _are_there(module._modules, self.children):
            return None
        for container, children in self.containers:
            if not _are_there(container._modules, children):
                return None
        for other in self.bypassed:
            if _is_intercepted(other):
                return None
        for program in self.programs:
            for owner, name, value in program.guards:
                now = getattr(module if owner is None else owner, name, _MISSING)
                if now is not value and not _is_unchanged(now, value):
                    break
            else:
                return program.run
        return None

    def __deepcopy__(self, memo: dict) -> "_Region":
        fields = {field.name: copy.deepcopy(getattr(self, field.name), memo) for field in dataclasses.fields(self)}
        return _Region(**fields)

    def __reduce__(self) -> tuple:
        return _no_region, ()


def _no_region() -> None:
    """What a region is pickled as."""


# Children by name. nn.Module stands for any module: one that the programs only call, whatever it is by then.
_Children = dict[str, nn.Module | type[nn.Module] | None]
_MISSING = object()
_COLLECTIONS = (list, dict, set, OrderedDict)
_BY_VALUE = (bool, int, float, str, set)


def _are_there(now: dict[str, nn.Module | None], then: _Children) -> bool:
    if len(now) != len(then):
        return False
    for name, child in then.items():
        other = now.get(name, _MISSING)
        if other is not child and (child is not nn.Module or not isinstance(other, nn.Module)):
            return False
    return True


def _is_unchanged(now: Any, then: Any) -> bool:
    """By value where that has one answer: that of == for tensors is a tensor."""
    if now is then or type(now) is not type(then):
        return now is then
    if isinstance(now, dict):
        return list(now) == list(then) and all(map(_is_unchanged, now.values(), then.values()))
    if isinstance(now, (list, tuple)):
        return len(now) == len(then) and all(map(_is_unchanged, now, then))
    return type(now) in _BY_VALUE and now == then


def _is_intercepted(module: nn.Module) -> bool:
    """Whether something besides the class's own forward happens when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


# --- the trace --------------------------------------------------------------------------------------------------------


class _Untraceable(Exception):
    """What a forward does that a trace would lose."""


class _Proxy(fx.Proxy):
    """A value in a trace. `isinstance` of one would be false for a tensor, and the trace would go the wrong way.

    It must not pretend to be a tensor either: C++ believes `__class__` too, and reads memory that is not there.
    """

    @property
    def __class__(self) -> type:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return _Proxy
        raise _Untraceable("asks for the type of a value")


class _Nothing(TorchDispatchMode):
    """Nothing is computed in a trace: a value that does not depend on the input would be frozen, a random one too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise _Untraceable(f"computes {func} of no input")


# Of what every module has, a forward may decide by its mode; the rest is machinery.
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}


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

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name not in _MACHINERY and name in object.__getattribute__(module, "__dict__"):
                self.reads.setdefault((module, name), value)
            return value

        try:
            with _Nothing(), _no_draws():
                nn.Module.__getattribute__ = read
                try:
                    graph = super().trace(root)
                finally:
                    del nn.Module.__getattribute__
        finally:
            changed = [name for module, attributes in before.items() for name in _restore(module, attributes)]
        if changed:
            raise _sets(changed[0])
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        return graph

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
            raise _Untraceable(f"makes a {type(a).__name__}")
        return super().create_arg(a)

    def get_fresh_qualname(self, prefix: str) -> str:
        raise _Untraceable("uses a value that is none of its parameters or buffers")

    def create_node(self, kind: str, target: Any, args: tuple, kwargs: dict, name=None, type_expr=None) -> fx.Node:
        if _ambient() != self.ambient:
            raise _Untraceable("switches gradients or autocast on or off while it runs")
        return super().create_node(kind, target, args, kwargs, name)  # types would have to be importable

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(m)
        if m not in self.parts and m not in self.opaque and _has_any(m, self.parts):
            reason = _why_not_inlined(m)
            if reason is None:
                before, inlined = _attributes(m), set(self.inlined)
                last = next(iter(reversed(self.graph.nodes)), None)
                try:
                    with _no_draws():
                        result = forward(*args, **kwargs)
                    if changed := _restore(m, before):
                        raise _sets(changed[0])
                    self.inlined.add(m)
                    return result
                except Exception as error:  # noqa: BLE001  a forward on proxies may raise anything
                    _restore(m, before)
                    self.inlined, reason = inlined, _words(error)
                    for node in reversed(self.graph.nodes):
                        if node is last:
                            break
                        if node.op != "get_attr":  # those are remembered for the next reader
                            self.graph.erase_node(node)
            self.opaque[m] = reason
        return self.create_proxy("call_module", path, args, kwargs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    graph: fx.Graph
    inlined: set[nn.Module]
    """Modules that the graph looks into."""
    reads: dict[tuple[nn.Module, str], Any]
    """Attributes by which the forward may have decided."""


def _has_any(module: nn.Module, parts: set[nn.Module]) -> bool:
    """Whether there may be something to fuse inside: a program calls other modules as they are."""
    return not parts.isdisjoint(module.modules())


def _sets(name: str) -> _Untraceable:
    names = {"_buffers": "a buffer", "_parameters": "a parameter", "_modules": "a child"}
    return _Untraceable(f"sets {names.get(name, name)} while it runs")


def _words(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"cannot be traced: {textwrap.shorten(text, 110, placeholder='...')}"


_DEVICES = "cpu", "cuda"


def _ambient() -> tuple:
    """What a forward may switch for a while and a trace does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in _DEVICES),
        *(torch.get_autocast_dtype(device) for device in _DEVICES),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # activation checkpointing, for one
    )


@contextmanager
def _no_draws() -> Iterator[None]:
    """Raises _Untraceable if the block draws from Python's or NumPy's generator, and takes it back."""
    before, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002  the generator that others draw from
    yield
    now = np.random.get_state()  # noqa: NPY002
    if random.getstate() != before or now[2:] != numpys[2:] or (now[1] != numpys[1]).any():
        random.setstate(before)
        np.random.set_state(numpys)  # noqa: NPY002
        raise _Untraceable("draws random numbers")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute and, for a collection, a copy of it."""
    return {name: (value, _content(value)) for name, value in vars(module).items()}


def _content(value: Any) -> Any:
    return copy.copy(value) if type(value) in _COLLECTIONS else None


def _restore(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> list[str]:
    """Undoes changes since `_attributes`; returns the names of what had changed."""
    now, changed = vars(module), []
    for name in [name for name in now if name not in before]:
        changed.append(name)
        del now[name]
    for name, (value, content) in before.items():
        if now.get(name, _MISSING) is not value:
            changed.append(name)
            now[name] = value
        if content is not None and not _same(value, content):
            changed.append(name)
            value.clear()
            (value.extend if type(value) is list else value.update)(content)
    return changed


def _same(a: Any, b: Any) -> bool:
    """By identity of the items: == of proxies would become part of the program."""
    flat = [(*x.keys(), *x.values()) if isinstance(x, dict) else tuple(x) for x in (a, b)]
    return len(flat[0]) == len(flat[1]) and all(x is y for x, y in zip(*flat, strict=True))


def _why_not_inlined(module: nn.Module) -> str | None:
    if module._compiled_call_impl is not None:
        return "is compiled"
    return _why_no_region(module) or ("has hooks" if _is_intercepted(module) else None)


def _why_no_region(module: nn.Module) -> str | None:
    cls = type(module)
    base = getattr(cls, "_base", cls)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule, LazyModuleMixin)) or is_parametrized(module):
        return f"is a {cls.__name__}"
    if "forward" in vars(module):
        return "its forward is replaced"
    if cls.__call__ is not nn.Module.__call__:
        return "has a __call__ of its own"
    if base.__reduce_ex__ is not object.__reduce_ex__ or base.__reduce__ is not object.__reduce__:
        return "is pickled in a way of its own"
    if base.__module__.startswith("torch.nn.") and base is not nn.Sequential:
        return f"is a {cls.__name__}"
    return None


# --- the chains -------------------------------------------------------------------------------------------------------

_RELUS = {functional.relu: False, torch.relu: False, torch.relu_: True, "relu": False, "relu_": True}
_POOLS = (functional.max_pool2d, torch.max_pool2d)
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_OTHERS_SEE = "an in-place ReLU of a value that others may see"
_FRESH = (operator.add, torch.add, torch.cat)  # results that are no other tensor's memory


def _kind_of_module(module: nn.Module) -> str | None:
    """The part a module can take in a chain: "conv", "norm", "relu", "pool", or None."""
    cls = type(module).__base__ if is_parametrized(module) else type(module)
    if cls is nn.MaxPool2d or cls is MaxPool2d:
        return None if module.return_indices or _is_intercepted(module) else "pool"
    return {Conv2d: "conv", nn.BatchNorm2d: "norm", nn.ReLU: "relu"}.get(cls)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A call in a traced program, as what it could be in a chain."""

    node: fx.Node
    kind: str | None
    """As `_kind_of_module`'s; None for anything else, and for a module with hooks."""
    name: str
    in_place: bool = False

    @classmethod
    def of(cls, node: fx.Node, root: nn.Module) -> "_Part":
        if node.op == "call_module":
            module = root.get_submodule(node.target)
            kind = _kind_of_module(module) if len(node.args) == 1 and not node.kwargs else None
            if kind is None or _is_intercepted(module):
                return cls(node=node, kind=None, name=node.target)
            in_place = kind == "relu" and module.inplace
            return cls(node=node, kind=kind, name=node.target, in_place=in_place)
        name = f"{getattr(node.target, '__name__', node.target)}()"
        if node.op in ("call_function", "call_method") and node.target in _RELUS:
            in_place = (*node.args[1:], node.kwargs.get("inplace", _RELUS[node.target]))[0]
            return cls(node=node, kind="relu", name=name, in_place=in_place)
        if node.op == "call_function" and node.target in _POOLS:
            arguments = _pool_arguments(node)
            # One tensor, and numbers that are no results of other calls.
            if not arguments.get("return_indices") and node.all_input_nodes == [arguments["input"]]:
                return cls(node=node, kind="pool", name="max_pool2d()")
        return cls(node=node, kind=None, name=name)


def _pool_arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_POOL_ARGUMENTS, node.args, strict=False)) | node.kwargs


class _Rewriter:
    """Finds the chains of one traced program and rewrites them; all names are of the whole model, by `prefix`."""

    def __init__(self, root: nn.Module, graph: fx.Graph, prefix: str):
        self.root, self.graph, self.prefix = root, graph, prefix
        self.parts = {node: _Part.of(node, root) for node in graph.nodes}
        self.chains: list[tuple[str, str]] = []
        self.left: dict[str, str] = {}
        self.members: list[nn.Module] = []
        """The modules in rewritten calls."""
        self.has_rewritten = False

    def run(self) -> None:
        taken: set[fx.Node] = set()
        for node, part in list(self.parts.items()):
            if node in taken:
                continue
            if part.kind == "conv":
                chain = self._from_convolution(part)
            elif part.kind in ("relu", "pool"):
                chain = self._from_relu(part)
            else:
                continue
            self._explain(part, chain)
            if chain:
                taken.update(member.node for member in chain)
                self._rewrite(chain)

    def _next(self, part: _Part, kind: str) -> _Part | None:
        """The one user of a part's value, if it is of that kind."""
        user = next(iter(part.node.users)) if len(part.node.users) == 1 else None
        return self.parts[user] if user is not None and self.parts[user].kind == kind else None

    def _from_convolution(self, conv: _Part) -> list[_Part]:
        chain = [conv]
        norm = self._next(conv, "norm")
        # A norm that is called elsewhere too must be called in the same order: its running mean remembers it.
        if norm and (conv.node.next is norm.node or [p.name for p in self.parts.values()].count(norm.name) == 1):
            chain.append(norm)
        if relu := self._next(chain[-1], "relu"):
            chain.append(relu)
            if pool := self._next(relu, "pool"):
                chain.append(pool)
        return chain if len(chain) > 1 else []

    def _from_relu(self, part: _Part) -> list[_Part]:
        """ReLU and max-pool of a value that no convolution's chain makes, or one max-pool."""
        if part.kind == "pool":
            return [part]
        pool = self._next(part, "pool")
        if pool is None or part.node.next is not pool.node or (part.in_place and not self._is_own(part)):
            return []
        return [part, pool]

    def _is_own(self, relu: _Part) -> bool:
        """Whether nobody else can see that a ReLU overwrites its input."""
        source = self.parts[relu.node.all_input_nodes[0]]
        fresh = source.kind in ("conv", "norm", "pool") or source.node.target in _FRESH
        return fresh and len(source.node.users) == 1

    def _rewrite(self, chain: list[_Part]) -> None:
        kinds = {part.kind: part for part in chain}
        pool, relu, norm, conv = (kinds.get(kind) for kind in ("pool", "relu", "norm", "conv"))
        names = " + ".join(self.prefix + part.name for part in chain)
        steps = [" + ".join(word for word, part in (("convolution", conv), ("batch norm", norm)) if part)]
        if pool:
            steps.append("ReLU + max-pool" if relu else "max-pool")
        elif relu:
            steps[0] += " + ReLU"
        self.chains.append((names, "; ".join(filter(None, steps))))
        if len(chain) == 1 and pool.node.op == "call_module":
            return  # a module of our class does it by itself
        self.has_rewritten = True
        self.members += [self.root.get_submodule(part.name) for part in chain if part.node.op == "call_module"]
        if norm:
            with self.graph.inserting_before(conv.node):
                module = self.graph.create_node("get_attr", norm.name)
            conv.node.kwargs = {"norm": module}
            self._drop(norm)
        if relu:
            self._drop(relu)
        if not pool:
            conv.node.kwargs = conv.node.kwargs | ({"relu": True} if relu else {})
        elif pool.node.op == "call_module":
            pool.node.kwargs = {"relu": True}
        else:
            arguments = _pool_arguments(pool.node)
            arguments.pop("return_indices", None)
            arguments["stride"] = arguments.get("stride") or None
            with self.graph.inserting_before(pool.node):
                call = self.graph.call_function(max_pool2d, (arguments.pop("input"),), arguments | {"relu": bool(relu)})
            pool.node.replace_all_uses_with(call)
            self.graph.erase_node(pool.node)

    def _drop(self, part: _Part) -> None:
        part.node.replace_all_uses_with(part.node.all_input_nodes[0])
        self.graph.erase_node(part.node)

    def _explain(self, part: _Part, chain: list[_Part]) -> None:
        """Why a part has no chain, or a chain ends before a norm."""
        name = self.prefix + part.name
        last = chain[-1] if chain else part
        if part.kind == "conv" and not chain:
            self.left[name] = self._followed_by(part)
        elif part.kind == "relu" and not chain and self._next(part, "pool"):
            own = not part.in_place or self._is_own(part)
            self.left[name] = "something runs before its max-pool" if own else _OTHERS_SEE
        if last.kind == "relu" and (norm := self._next(last, "norm")):
            self.left[self.prefix + norm.name] = "batch norm follows the ReLU"

    def _followed_by(self, part: _Part) -> str:
        users = list(part.node.users)
        if len(users) > 1:
            return f"its value is used {len(users)} times"
        if not users or users[0].op == "output":
            return "followed by nothing"
        if users[0].op != "call_module":
            return f"followed by {self.parts[users[0]].name}"
        module = self.root.get_submodule(users[0].target)
        return f"followed by {type(module).__name__}{' with hooks' if _is_intercepted(module) else ''}"


# --- the regions ------------------------------------------------------------------------------------------------------


class _Analysis:
    """The regions of a model, and the report on all of it."""

    def __init__(self, model: nn.Module):
        self.regions: dict[nn.Module, _Region] = {}
        self.chains: list[tuple[str, str]] = []
        self.left: dict[str, str] = {}
        self.seen: set[nn.Module] = set()
        self.inlined: set[nn.Module] = set()
        self.parts = {module for module in model.modules() if _kind_of_module(module)}
        self._visit(model, "")
        for name, module in model.named_modules():
            self._look_at(module, name or "the model")

    def _look_at(self, module: nn.Module, name: str) -> None:
        """Reports what no program knows of: convolutions that are not ours, and pools that no region calls."""
        reported = any(name in names.split(" + ") for names, _ in self.chains)
        if type(module) is nn.Conv2d:
            self.left[name] = "an nn.Conv2d: swap_conv2d first"
        elif type(module) in (nn.MaxPool2d, MaxPool2d) and not reported:
            if _kind_of_module(module) == "pool":
                self.chains.append((name, "max-pool"))
            else:
                self.left[name] = "returns indices" if module.return_indices else "has hooks"
        elif _kind_of_module(module) == "conv" and not reported and _is_intercepted(module):
            self.left[name] = "has hooks"

    def _visit(self, module: nn.Module, prefix: str) -> None:
        """Makes the module a region, or else what is in it."""
        if module in self.seen or module in self.parts or not _has_any(module, self.parts):
            return
        self.seen.add(module)
        name = prefix.removesuffix(".") or "the model"
        reason = _why_no_region(module)
        if reason is None:
            try:
                self._trace(module, prefix)
            except Exception as error:  # noqa: BLE001  a forward on proxies may raise anything
                self.left[name] = _words(error)
        elif type(module) not in (nn.ModuleList, nn.ModuleDict):
            self.left[name] = reason
        self._visit_children(module, prefix)

    def _visit_children(self, module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}."
            if child in self.inlined:
                self._visit_children(child, path)
            else:
                self._visit(child, path)

    def _trace(self, root: nn.Module, prefix: str) -> None:
        """Makes `root` a region if it has chains to rewrite."""
        opaque: dict[nn.Module, str] = {}
        traces = [_trace(root, self.parts, opaque, training=True)]
        if any(name == "training" for _, name in traces[0].reads):
            traces.append(_trace(root, self.parts, opaque, training=False))
        inlined = set.union(*(trace.inlined for trace in traces)) - opaque.keys()
        programs, members, has_rewritten = [], [], False
        for trace in traces:
            rewriter = _Rewriter(root, trace.graph, prefix)
            rewriter.run()
            self.chains = list(dict.fromkeys([*self.chains, *rewriter.chains]))
            self.left |= rewriter.left
            members += rewriter.members
            has_rewritten |= rewriter.has_rewritten
            guards = tuple(
                (None if module is root else module, name, copy.copy(value) if type(value) in _COLLECTIONS else value)
                for (module, name), value in trace.reads.items()
            )
            programs.append(_Program(run=_compile(trace.graph, type(root).__name__), guards=guards))
        paths = {module: path for path, module in root.named_modules()}
        self.left |= {prefix + paths[module]: reason for module, reason in opaque.items()}
        if has_rewritten:
            arity = sum(node.op == "placeholder" for node in traces[0].graph.nodes)
            self.regions[root] = _region(root, tuple(programs), arity, inlined, members)
        self.inlined |= inlined


def _analyse(model: nn.Module) -> _Analysis:
    """Of the model as it was before any fusing; leaves it as it is."""
    regions = {module: _unfuse(module) for module in list(model.modules()) if isinstance(module, _Fused)}
    try:
        return _Analysis(model)
    finally:
        for module, region in regions.items():
            _refuse(module, region)


def _trace(root: nn.Module, parts: set[nn.Module], opaque: dict[nn.Module, str], training: bool) -> _Trace:
    """A trace of `root` with all of its modules in one mode; adds to `opaque`."""
    modes = {module: module.training for module in root.modules()}
    try:
        for module in modes:
            module.training = training
        while True:
            usual = _trace_once(root, parts, opaque, grad=True)
            known = len(opaque)
            other = _trace_once(root, parts, opaque, grad=False)
            if len(opaque) == known:
                break
    finally:
        for module, mode in modes.items():
            module.training = mode
    if usual.graph.python_code("self").src != other.graph.python_code("self").src:
        raise _Untraceable("asks whether gradients or autocast are on")
    return usual


def _trace_once(root: nn.Module, parts: set[nn.Module], opaque: dict[nn.Module, str], *, grad: bool) -> _Trace:
    """With gradients on and autocast off, or the reverse: whatever the forward switches is the other in one of them."""
    with torch.set_grad_enabled(grad), _autocast(not grad):
        tracer = _Tracer(parts, opaque)
        try:
            return _Trace(graph=tracer.trace(root), inlined=tracer.inlined, reads=tracer.reads)
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


def _compile(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function of a module and tensors that the graph stands for; it looks modules up in the module as it runs."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<fused {name}>", "exec"), names)
    return names["forward"]


def _region(
    root: nn.Module, programs: tuple[_Program, ...], arity: int, inlined: set[nn.Module], members: list[nn.Module]
) -> _Region:
    containers: list[nn.Module] = []

    def descend(module: nn.Module) -> None:
        """Collects what the forward may look into: all but what it calls."""
        for child in module.children():
            if child in inlined or type(child) in (nn.ModuleList, nn.ModuleDict):
                containers.append(child)
                descend(child)

    descend(root)
    places = Counter(module for _, module in root.named_modules(remove_duplicate=False))
    read = {module for program in programs for module, _, _ in program.guards}
    # One of several places of a module may be given another, and the programs know the first alone.
    fixed = {None, *containers, *members, *read, *(module for module, count in places.items() if count > 1)}

    def children(module: nn.Module) -> _Children:
        return {name: child if child in fixed else nn.Module for name, child in module._modules.items()}

    return _Region(
        programs=programs,
        arity=arity,
        children=children(root),
        containers=tuple((module, children(module)) for module in dict.fromkeys(containers)),
        bypassed=tuple(dict.fromkeys([*inlined, *members])),
    )
