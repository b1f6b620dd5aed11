"""Meta tensors in the role of a device: what PyTorch does on that device and would not do on meta tensors.

    with StandIn("sm_75", amp=torch.float16):
        logits = model(x)

Meta tensors go through the same operators as real ones, but for two things: autocast leaves them alone, and attention
falls apart into its matrix products, where a device has one operator that keeps no matrix of scores.

Source of the lists: PyTorch, "Automatic Mixed Precision package", "CUDA Ops that can autocast to float16" and "... that
autocast to float32". The CPU's lists differ, but in nothing that the lab's models call.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from kernels import runtime

CPU = "cpu"
LABS = ("kernels.conv2d", "kernels.unfold", "kernels.variants")
"""Where the lab's own convolutions are defined."""

# By the names of functions, methods and torch.nn.functional alike.
LOWER_PRECISION = {
    "__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d",
    "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul", "mm",
    "linalg_multi_dot", "mv", "prelu", "scaled_dot_product_attention", "unfold_conv2d",
}  # fmt: skip
FULL_PRECISION = {
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "cdist", "cosh", "cosine_similarity",
    "binary_cross_entropy_with_logits", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1",
    "group_norm", "kl_div", "l1_loss", "layer_norm", "linalg_vector_norm", "log", "log10", "log1p", "log2",
    "log_softmax", "mse_loss", "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "renorm", "rsqrt",
    "sinh", "smooth_l1_loss", "softmax", "softmin", "softplus", "sum", "tan",
}  # fmt: skip


class StandIn(TorchFunctionMode):
    """While open, meta tensors are treated as tensors of `role` would be; tensors of other devices are left alone.

    role   "cpu", or a GPU's architecture as "sm_80"
    amp    what autocast computes in, or None: float16, bfloat16

    As autocast does, it casts a parameter once and keeps the copy until it is closed, but for the lab's own
    convolutions, which cast it at each call. The backward pass belongs outside, as there too.

    Raises ValueError for a role that is neither.
    """

    def __init__(self, role: str, *, amp: torch.dtype | None = None) -> None:
        super().__init__()
        _check(role)
        self.role, self.amp = role, amp
        self._casts: dict[Tensor, Tensor] = {}

    def __exit__(self, *exception: object) -> None:
        self._casts.clear()
        super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.amp is not None and name in LOWER_PRECISION:
            is_labs = getattr(func, "__module__", None) in LABS  # methods of tensors have none
            cast = self._lowered if is_labs else self._lowered_once
            args, kwargs = tree_map(cast, (args, kwargs))
        elif self.amp is not None and name in FULL_PRECISION:
            args, kwargs = tree_map(_raised, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _lowered(self, value: object) -> object:
        return value.to(self.amp) if _is_castable(value) else value

    def _lowered_once(self, value: object) -> object:
        is_parameter = _is_castable(value) and value.requires_grad and value.is_leaf and not value._is_view()
        if not is_parameter or value.dtype != torch.float32:
            return self._lowered(value)
        if value not in self._casts:
            self._casts[value] = value.to(self.amp)
        return self._casts[value]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (N, heads, tokens, width) -> the same shape, by the operator that the device would take."""
        aten = torch.ops.aten
        if self.role == CPU:
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        if q.dtype == torch.float32 or self.role == "sm_75":  # FlashAttention takes 16 bits, from sm_80 up
            keeps = any(tensor.requires_grad for tensor in (q, k, v))
            return aten._scaled_dot_product_efficient_attention(q, k, v, None, keeps)[0]
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _is_castable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.is_floating_point() and value.dtype != torch.float64


def _raised(value: object) -> object:
    return value.float() if _is_castable(value) else value


@contextlib.contextmanager
def in_the_role_of(role: str, multiprocessors: int | None = None) -> Iterator[None]:
    """While open, launchers on meta tensors take the buffers that they would take on `role`; see `runtime.planning`.

    `multiprocessors` are the GPU's, by default those of the best-known one of its architecture. Raises ValueError for a
    role that is unknown.
    """
    _check(role)
    target = runtime.Target(runtime.INTERPRETER, 1)
    if role != CPU:
        target = runtime.Target(role, multiprocessors or runtime.MULTIPROCESSORS[role])
    with runtime.planning(target):
        yield


def _check(role: str) -> None:
    if role != CPU and role not in runtime.MULTIPROCESSORS:
        raise ValueError(f"unknown role {role!r}; known: {CPU}, {', '.join(runtime.MULTIPROCESSORS)}")
