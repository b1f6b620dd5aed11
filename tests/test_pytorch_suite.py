"""PyTorch's own material for its 2-D convolution, as the installed torch brings it, run on ours.

op_db       sample and error inputs of torch.nn.functional.conv2d
module_db   module inputs of nn.Conv2d and nn.LazyConv2d
common_nn   the table of modules that PyTorch's test_nn.py runs

Samples in the floating dtypes must all pass, in value, first and second gradients; complex and integer ones must all be
refused by name.
"""

import pytest
import torch
from reference import assert_operands_match, native_conv2d, second_gradients
from torch import nn
from torch.func import functional_call
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_nn import get_new_module_tests, module_tests

from kernels import Conv2d, LazyConv2d, conv2d

(CONV2D,) = (op for op in op_db if op.name == "nn.functional.conv2d")
FLOATING = sorted((dtype for dtype in CONV2D.dtypes if dtype.is_floating_point), key=str)
REFUSED = sorted((dtype for dtype in CONV2D.dtypes if not dtype.is_floating_point), key=str)
SAMPLES = range(len(list(CONV2D.sample_inputs("cpu", torch.float64))))


def sample(index: int, dtype: torch.dtype, requires_grad: bool = False) -> tuple[tuple, dict]:
    """The sample's operands (x, w, bias or None) and geometry."""
    chosen = list(CONV2D.sample_inputs("cpu", dtype, requires_grad=requires_grad))[index]
    operands = (chosen.input, *chosen.args)
    return operands + (None,) * (3 - len(operands)), chosen.kwargs


def test_the_material_is_there():
    assert len(SAMPLES) >= 30
    assert {torch.float64, torch.float32, torch.float16, torch.bfloat16} == set(FLOATING)
    assert {torch.int64, torch.complex64, torch.complex128} == set(REFUSED)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("index", SAMPLES)
def test_samples_agree_in_value_and_first_gradients(index, dtype):
    operands, geometry = sample(index, dtype)
    assert_operands_match(conv2d, *operands, **geometry)


@pytest.mark.parametrize("index", SAMPLES)
def test_samples_agree_in_second_gradients(index):
    operands, geometry = sample(index, torch.float64)
    ours, native = (second_gradients(conv, *operands, **geometry) for conv in (conv2d, native_conv2d))
    torch.testing.assert_close(ours, native, rtol=1e-9, atol=1e-9)


def gradchecks(function, inputs: list[torch.Tensor]) -> bool:
    """PyTorch's numerical checks of first and second derivatives, forward mode included, in their fast form."""
    return torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True) and (
        torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("index", SAMPLES)
def test_samples_pass_gradcheck_and_gradgradcheck(index):
    operands, geometry = sample(index, torch.float64, requires_grad=True)
    tensors = [operand for operand in operands if operand is not None]
    assert gradchecks(lambda x, w, b=None: conv2d(x, w, b, **geometry), tensors)


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
@pytest.mark.parametrize("index", SAMPLES)
def test_complex_and_integer_samples_are_refused_by_name(index, dtype):
    operands, geometry = sample(index, dtype)
    with pytest.raises(RuntimeError, match=f"conv2d: {dtype} is not supported"):
        conv2d(*operands, **geometry)


@pytest.mark.parametrize("index", range(len(list(CONV2D.error_inputs("cpu")))))
def test_error_inputs_raise_pytorchs_exception_with_its_words(index):
    error = list(CONV2D.error_inputs("cpu"))[index]
    with pytest.raises(error.error_type, match=error.error_regex):
        conv2d(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)


MODULES = {nn.Conv2d: Conv2d, nn.LazyConv2d: LazyConv2d}
MODULE_INPUTS = [
    pytest.param(native, inputs, training, id=f"{native.__name__}-{index}-{'train' if training else 'eval'}")
    for info in module_db
    for native in (info.module_cls,)
    if native in MODULES
    for training in (True, False)
    for index, inputs in enumerate(
        info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    )
]


def assert_same_module(ours: nn.Module, native: nn.Module, x: torch.Tensor) -> None:
    """Both agree on x, with the parameters of `ours`, in results, gradients, layouts and repr."""
    ours(x)
    native(x)  # a lazy module has its parameters from here on
    assert repr(ours) == repr(native)
    native.load_state_dict(ours.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = x if x.dim() == 3 else x.to(memory_format=layout)
        y, expected = ours(batch), native(batch)
        torch.testing.assert_close(y, expected, check_stride=True)
        gradients = (torch.autograd.grad(y.pow(2).sum(), m.parameters()) for m, y in ((ours, y), (native, expected)))
        for gradient, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-9)


def module_gradchecks(module: nn.Module, x: torch.Tensor) -> bool:
    """`gradchecks` over the module's input and parameters."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    return gradchecks(
        lambda x, *p: functional_call(module, dict(zip(names, p, strict=True)), (x,)),
        [x.detach().requires_grad_(), *parameters],
    )


def test_the_modules_are_there():
    assert {parameter.values[0] for parameter in MODULE_INPUTS} == set(MODULES)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("native", "inputs", "training"), MODULE_INPUTS)
def test_module_inputs_agree(native, inputs, training):
    arguments, keywords = inputs.constructor_input.args, inputs.constructor_input.kwargs
    ours, theirs = (
        cls(*arguments, **keywords, dtype=torch.float64).train(training) for cls in (MODULES[native], native)
    )
    assert_same_module(ours, theirs, *inputs.forward_input.args)
    assert type(ours) is Conv2d


# A lazy module is a Conv2d from its first call on, and a convolution has no mode: their derivatives are these.
@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(inputs, id=parameter.id)
        for parameter in MODULE_INPUTS
        for native, inputs, training in (parameter.values,)
        if native is nn.Conv2d and training
    ],
)
def test_module_inputs_pass_gradcheck_and_gradgradcheck(inputs):
    module = Conv2d(*inputs.constructor_input.args, **inputs.constructor_input.kwargs, dtype=torch.float64)
    assert module_gradchecks(module, *inputs.forward_input.args)


# What the table says in Python: a constructor, or a class with its arguments.
TABLE = [
    pytest.param(entry, id=entry.get("fullname") or f"Conv2d_{entry.get('desc', 'plain')}")
    for entry in (*module_tests, *get_new_module_tests())
    if (entry.get("module_name") or entry.get("fullname", "").split("_")[0]) == "Conv2d"
]


def from_the_table(entry: dict) -> tuple[Conv2d, nn.Conv2d, torch.Tensor]:
    """Our module and PyTorch's, and an input for them."""
    native = entry["constructor"]() if "constructor" in entry else nn.Conv2d(*entry["constructor_args"])
    ours = Conv2d(
        native.in_channels, native.out_channels, native.kernel_size, native.stride, native.padding, native.dilation,
        native.groups, native.bias is not None, native.padding_mode, dtype=torch.float64,
    )  # fmt: skip
    return ours, native.double(), torch.randn(entry["input_size"], dtype=torch.float64)


def test_the_table_is_there():
    assert len(TABLE) >= 20


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("entry", TABLE)
def test_the_table_of_modules_agrees(entry):
    assert_same_module(*from_the_table(entry))


@pytest.mark.slow
@pytest.mark.parametrize("entry", [parameter for parameter in TABLE if parameter.values[0]["input_size"][0] > 0])
def test_the_table_of_modules_passes_gradcheck_and_gradgradcheck(entry):
    ours, _, x = from_the_table(entry)
    assert module_gradchecks(ours, x)
