"""What a fused module runs in place of its own forward, and what must be as it was for that: asked in every call."""

import copy
import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# The children of a module by name. nn.Module stands for any module: the programs only call it, whatever it is by then.
Children = dict[str, nn.Module | type[nn.Module] | None]

_MISSING = object()
_COLLECTIONS = (list, dict, set, OrderedDict)
_BY_VALUE = (bool, int, float, str, set)


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """A traced forward, with its chains rewritten."""

    run: Callable[..., Any]
    """run(module, *tensors)."""
    guards: tuple[tuple[nn.Module | None, str, Any], ...]
    """Attributes that the forward read while it was traced: of a module, None for the region's own, name and value."""

    @classmethod
    def of(cls, run: Callable[..., Any], root: nn.Module, reads: dict[tuple[nn.Module, str], Any]) -> "Program":
        """A program for what `root` read."""
        guards = ((_owner(module, root), name, copied(value)) for (module, name), value in reads.items())
        return cls(run=run, guards=tuple(guards))

    def fits(self, module: nn.Module) -> bool:
        """Whether the forward would decide the same now."""
        for owner, name, value in self.guards:
            if not is_same(getattr(module if owner is None else owner, name, _MISSING), value):
                return False
        return True


@dataclass(frozen=True, eq=False, slots=True)
class Region:
    """The programs of one module. It may run for copies of the module too, and so never refers to the module itself."""

    programs: tuple[Program, ...]
    """One, or one for each mode where the forward asks for the mode."""
    arity: int
    """How many tensors the programs take. With more, an optional argument is given, and they know its default alone."""
    containers: tuple[tuple[nn.Module | None, Children], ...]
    """Modules that the programs look into, None for the region's own, and their children."""
    bypassed: tuple[nn.Module, ...]
    """Modules that the programs do not call, or not as the forward does: a hook on them would see something else."""

    @classmethod
    def of(
        cls,
        root: nn.Module,
        programs: tuple[Program, ...],
        *,
        arity: int,
        inlined: set[nn.Module],
        rewritten: list[nn.Module],
    ) -> "Region":
        """A region of programs that look into `inlined` modules and call `rewritten` ones differently, if at all."""
        containers = [root]
        for module in containers:  # grows
            lists = (nn.ModuleList, nn.ModuleDict)
            containers += [child for child in module.children() if child in inlined or type(child) in lists]
        places = Counter(module for _, module in root.named_modules(remove_duplicate=False))
        read = {module for program in programs for module, _, _ in program.guards}
        # One of several places of a module may be given another, and the programs know the first alone.
        shared = {module for module, count in places.items() if count > 1}
        fixed = {None, *containers, *rewritten, *read, *shared}

        def children(module: nn.Module) -> Children:
            return {name: child if child in fixed else nn.Module for name, child in module._modules.items()}

        return cls(
            programs=programs,
            arity=arity,
            containers=tuple((_owner(module, root), children(module)) for module in dict.fromkeys(containers)),
            bypassed=tuple(dict.fromkeys([*inlined, *rewritten])),
        )

    def program(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """The program to run on these arguments; None if the module must run its own forward."""
        if len(args) + len(kwargs) != self.arity:
            return None
        for value in (*args, *kwargs.values()):  # a forward may ask whether a tensor is None
            if not isinstance(value, Tensor):
                return None
        for container, children in self.containers:
            if not _are_there((module if container is None else container)._modules, children):
                return None
        for other in self.bypassed:
            if is_intercepted(other):
                return None
        for program in self.programs:
            if program.fits(module):
                return program.run
        return None

    def __deepcopy__(self, memo: dict) -> "Region":
        fields = {field.name: copy.deepcopy(getattr(self, field.name), memo) for field in dataclasses.fields(self)}
        return Region(**fields)

    def __reduce__(self) -> tuple:
        """Pickles as None: a program has no source to import, and the forward's may have changed by the time."""
        return type(None), ()


def is_intercepted(module: nn.Module) -> bool:
    """Whether something besides the class's own forward happens when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def copied(value: Any) -> Any:
    """What `is_same` can compare an attribute with later: a collection may be changed in place, so a copy of it."""
    return copy.copy(value) if type(value) in _COLLECTIONS else value


def is_same(now: Any, then: Any) -> bool:
    """By value where == has one answer: that of tensors is a tensor, and in a trace it would be part of the graph."""
    if now is then or type(now) is not type(then):
        return now is then
    if isinstance(now, dict):
        return is_same(list(now.items()), list(then.items()))
    if isinstance(now, (list, tuple)):
        return len(now) == len(then) and all(map(is_same, now, then))
    return type(now) in _BY_VALUE and now == then


def _owner(module: nn.Module, root: nn.Module) -> nn.Module | None:
    return None if module is root else module


def _are_there(now: dict[str, nn.Module | None], then: Children) -> bool:
    if len(now) != len(then):
        return False
    for name, child in then.items():
        other = now.get(name, _MISSING)
        if other is not child and (child is not nn.Module or not isinstance(other, nn.Module)):
            return False
    return True
