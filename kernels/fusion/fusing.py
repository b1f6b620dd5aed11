"""fuse() and fusion_report(), and the class that a region's module gets."""

import functools
from typing import Any

from torch import nn

from kernels.fusion.analysis import Analysis
from kernels.fusion.chains import kind_of
from kernels.fusion.region import Region
from kernels.fusion.report import Fusion
from kernels.max_pool2d import MaxPool2d


def fuse(model: nn.Module) -> nn.Module:
    """Fuses every chain of the package's table in a model, in place; returns it. `fusion_report(model)` tells which.

    Outputs and gradients stay the same, to within rounding, in training and evaluation. Modules stay the objects they
    are, with their names, parameters and state_dict; every plain nn.MaxPool2d becomes a `MaxPool2d`, and a module whose
    forward is rewritten gets a subclass of its class with the same name. Nothing runs, and no mode or buffer changes.

    Only our convolutions take part: `swap_conv2d` first. Fuse before `torch.compile` and data-parallel wrappers. Parts
    where a child, a hook or an attribute changes later run unfused until fused again. Not noticed, so fuse again, are
    changes inside an attribute deeper than the items of a list, dict or set, of globals, and of a parameter or buffer
    from or to None. Hooks on all modules at once (`register_module_forward_hook`) see no module that is fused away.
    What a forward does besides computing its result (printing, counting in a global) happens unfused only. While this
    runs, no other thread may call modules: tracing replaces methods of nn.Module.
    """
    found = _analyse(model)
    for module in list(model.modules()):
        _take_region(module)
        if type(module) is nn.MaxPool2d and kind_of(module) == "pool":
            module.__class__ = MaxPool2d
    for module, region in found.regions.items():
        _give_region(module, region)
    return model


def fusion_report(model: nn.Module) -> Fusion:
    """What `fuse` makes, or has made, of a model's chains, and what it leaves alone and why. Changes nothing."""
    found = _analyse(model)
    return Fusion(chains=tuple(found.chains), left=tuple(found.left.items()))


def _analyse(model: nn.Module) -> Analysis:
    """Of the model as it was before any fusing; leaves it as it is."""
    regions = {module: _take_region(module) for module in list(model.modules()) if isinstance(module, _Fused)}
    try:
        return Analysis(model)
    finally:
        for module, region in regions.items():
            _give_region(module, region)


class _Fused:
    """Mixed into the class of a region's module; `_fused` is the module's region, None in an object made otherwise."""

    _base: type[nn.Module]
    _fused: Region | None = None

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickles by the name of the base class: no module holds this one's."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self._base,), *state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._fused is None:  # unpickled: its classes' sources may have changed meanwhile
            fuse(self)


def _take_region(module: nn.Module) -> Region | None:
    """Gives a module its own class back; returns its region."""
    if not isinstance(module, _Fused):
        return None
    region = vars(module).pop("_fused", None)
    module.__class__ = module._base
    return region


def _give_region(module: nn.Module, region: Region | None) -> None:
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
