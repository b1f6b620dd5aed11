"""Finds the chains of one traced graph and rewrites them into fused operators, by the table of the package."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from kernels.conv2d import Conv2d
from kernels.fusion.region import is_intercepted
from kernels.max_pool2d import MaxPool2d, max_pool2d

_KINDS = {Conv2d: "conv", nn.BatchNorm2d: "norm", nn.ReLU: "relu", nn.MaxPool2d: "pool", MaxPool2d: "pool"}
# Functions and methods, and whether each is in place.
_RELUS = {functional.relu: False, torch.relu: False, torch.relu_: True, "relu": False, "relu_": True}
_POOLS = (functional.max_pool2d, torch.max_pool2d)
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_OTHERS_SEE = "an in-place ReLU of a value that others may see"
_FRESH = (operator.add, torch.add, torch.cat)  # results that are no other tensor's memory


def kind_of(module: nn.Module) -> str | None:
    """The part a module can take in a chain: "conv", "norm", "relu", "pool"; None for any other, or with hooks."""
    kind = _KINDS.get(type(module).__base__ if is_parametrized(module) else type(module))
    return None if is_intercepted(module) or (kind == "pool" and module.return_indices) else kind


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A call in a traced program, as what it could be in a chain."""

    node: fx.Node
    kind: str | None
    """As `kind_of`'s."""
    name: str
    in_place: bool = False

    @classmethod
    def of(cls, node: fx.Node, root: nn.Module) -> "_Part":
        if node.op == "call_module":
            module = root.get_submodule(node.target)
            kind = kind_of(module) if len(node.args) == 1 and not node.kwargs else None
            return cls(node=node, kind=kind, name=node.target, in_place=kind == "relu" and module.inplace)
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


class Rewriter:
    """Finds the chains of one traced program and rewrites them; all names are of the whole model, by `prefix`."""

    def __init__(self, root: nn.Module, graph: fx.Graph, prefix: str):
        self.root, self.graph, self.prefix = root, graph, prefix
        self.parts = {node: _Part.of(node, root) for node in graph.nodes}
        self.chains: list[tuple[str, str]] = []
        self.left: dict[str, str] = {}
        self.rewritten: list[nn.Module] = []
        """Modules whose calls are changed or gone."""
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
        # Nothing may come between: another call of the norm, or what reads or writes its statistics.
        if norm and conv.node.next is norm.node:
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
        # The ReLU moves to the pool: what runs between the two might overwrite its input.
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
        self.rewritten += [self.root.get_submodule(part.name) for part in chain if part.node.op == "call_module"]
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
        return f"followed by {type(module).__name__}{' with hooks' if is_intercepted(module) else ''}"
