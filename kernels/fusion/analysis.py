"""Looks through a model for regions, the largest modules that can be traced, and reports on all that is in it."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from kernels.conv2d import Conv2d
from kernels.fusion.chains import Rewriter, kind_of
from kernels.fusion.region import Program, Region, is_intercepted
from kernels.fusion.trace import has_any, in_words, traces_of, why_not_traced
from kernels.max_pool2d import MaxPool2d


class Analysis:
    """The regions of a model, none of whose modules is fused yet, and the report on all of it."""

    def __init__(self, model: nn.Module):
        self.regions: dict[nn.Module, Region] = {}
        self.chains: list[tuple[str, str]] = []
        self.left: dict[str, str] = {}
        self.seen: set[nn.Module] = set()
        self.inlined: set[nn.Module] = set()
        self.parts = {module for module in model.modules() if kind_of(module)}
        self._visit(model, "")
        for name, module in model.named_modules():
            self._look_at(module, name or "the model")

    def _look_at(self, module: nn.Module, name: str) -> None:
        """Reports what no program knows of: convolutions that are not ours, and pools that no region calls."""
        if type(module) is nn.Conv2d:
            self.left[name] = "an nn.Conv2d: swap_conv2d first"
        elif any(name in names.split(" + ") for names, _ in self.chains):
            return
        elif kind_of(module) == "pool":
            self.chains.append((name, "max-pool"))
        elif type(module) in (nn.MaxPool2d, MaxPool2d) and module.return_indices:
            self.left[name] = "returns indices"
        elif type(module) in (Conv2d, nn.MaxPool2d, MaxPool2d) and is_intercepted(module):
            self.left[name] = "has hooks"

    def _visit(self, module: nn.Module, prefix: str) -> None:
        """Makes the module a region, or else what is in it."""
        if module in self.seen or module in self.parts or not has_any(module, self.parts):
            return
        self.seen.add(module)
        reason = why_not_traced(module)
        if reason is None:
            try:
                self._trace(module, prefix)
            except Exception as error:  # noqa: BLE001  a forward on proxies may raise anything
                reason = in_words(error)
        if reason and type(module) not in (nn.ModuleList, nn.ModuleDict):  # which have no forward to trace
            self.left[prefix.removesuffix(".") or "the model"] = reason
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
        traces, opaque = traces_of(root, self.parts)
        rewriters = [Rewriter(root, trace.graph, prefix) for trace in traces]
        for rewriter in rewriters:
            rewriter.run()
            self.chains = list(dict.fromkeys([*self.chains, *rewriter.chains]))
            self.left |= rewriter.left
        paths = {module: path for path, module in root.named_modules()}
        self.left |= {prefix + paths[module]: reason for module, reason in opaque.items()}
        inlined = set.union(*(trace.inlined for trace in traces))
        self.inlined |= inlined
        if not any(rewriter.has_rewritten for rewriter in rewriters):
            return
        self.regions[root] = Region.of(
            root,
            tuple(Program.of(_compile(t.graph, type(root).__name__), root, t.reads) for t in traces),
            arity=sum(node.op == "placeholder" for node in traces[0].graph.nodes),
            inlined=inlined,
            rewritten=[module for rewriter in rewriters for module in rewriter.rewritten],
        )


def _compile(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function of a module and tensors that the graph stands for; it looks modules up in the module as it runs."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<fused {name}>", "exec"), names)
    return names["forward"]
