"""Variants: a file in kernels/variants is a convolution of its own, everywhere, or says why it is none."""

import json
import pickle
import re

import own_kernel
import pytest
import torch
from own_kernel import function_of
from reference import assert_matches, random
from torch.func import jvp, vmap

import bench.memory.command
import bench.report_card.command
import models
import train.evaluate
from bench.measure.predict import GPUS
from bench.memory.traffic import make_report as traffic_report
from bench.report_card.card import row
from kernels import ops, runtime, variants
from kernels.geometry import ConvGeometry
from kernels.variants import conv2d_by
from train.rehearsal import FORWARD, Step, rehearse, track
from train.report import backend_of

G64 = ConvGeometry.of((256, 64, 32, 32), (64, 64, 3, 3), 1, 1)
NAME = "tried"
"""Of the page's kernel here, which a reader's own file does not have."""


@pytest.fixture
def put(tmp_path, monkeypatch):
    """put("mine", text) -> the Conv2d of that file in kernels/variants, until the test ends."""
    folder = tmp_path / "variants"
    folder.mkdir()
    return lambda name, text: own_kernel.install(name, text, folder, monkeypatch)


@pytest.fixture
def tried(put):
    """The page's kernel."""
    return put(NAME, own_kernel.source(own_kernel.KERNEL))


# What a variant computes


def test_a_variant_is_nn_conv2d_by_another_kernel(tried):
    torch.manual_seed(0)
    ours = tried(3, 8, 3, stride=2, padding=1)
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert repr(ours) == repr(theirs)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert type(pickle.loads(pickle.dumps(ours))) is tried
    assert_matches(function_of(tried), (2, 3, 7, 6), (8, 3, 3, 3), torch.float64, stride=2, padding=1)


def test_the_forward_pass_is_the_variants_and_the_gradients_are_ours(tried, launches):
    x = random(2, 3, 6, 6, dtype=torch.float64, seed=1).requires_grad_()
    layer = tried(3, 4, 3, dtype=torch.float64)
    y = layer(x)
    assert launches == []
    y.sum().backward()
    assert launches == ["input_grad", "weight_grad"]


def test_every_order_of_differentiation_is_right(tried):
    x, w, b = (random(*shape, dtype=torch.float64, seed=1) for shape in ((1, 3, 4, 4), (2, 3, 3, 3), (2,)))
    conv2d = function_of(tried)
    operands = [t.requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradgradcheck(conv2d, operands, fast_mode=True)
    (_, tangent) = jvp(lambda x: conv2d(x, w, b), (x.detach(),), (x.detach(),))
    torch.testing.assert_close(tangent, torch.nn.functional.conv2d(x, w))


def test_torch_compile_takes_it_whole(tried):
    layer, x = tried(3, 4, 3, dtype=torch.float64), random(2, 3, 6, 6, dtype=torch.float64, seed=1).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(*(torch.autograd.grad(f(x).pow(2).sum(), x)[0] for f in (compiled, layer)))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_launchers_get_the_layout_they_ask_for(layout, monkeypatch):
    seen = []

    def forward(x, w, bias, y, geometry, precision):
        seen.extend(t.is_contiguous(memory_format=layout) for t in (x, w, y))
        assert bias.is_contiguous()
        y.copy_(ops.forward_op(x, w, bias, (1, 1), (0, 0), (1, 1), 1))

    forward.__module__ = f"{variants.__name__}.elsewhere"
    monkeypatch.setattr(runtime, "_operations", {})
    conv2d = function_of(conv2d_by(forward, memory_format=layout))
    for given in (torch.channels_last, torch.contiguous_format):
        assert_matches(conv2d, (2, 3, 5, 5), (4, 3, 3, 3), layout=given)
    assert seen == [True] * 6


def test_of_no_images_nothing_is_launched(tried):
    assert tried(3, 4, 3)(torch.empty(0, 3, 5, 5)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda conv: conv(3, 4, 3, padding="same"), "got padding 'same', mode 'zeros'"),
        (lambda conv: conv(3, 4, 3, padding=1, padding_mode="reflect"), "mode 'reflect'"),
        (lambda conv: conv(4, 4, 3, groups=2)(torch.ones(1, 4, 5, 5)), "groups must be 1, got 2"),
        (lambda conv: conv(3, 4, 3)(torch.ones(3, 5, 5)), "4"),
        (lambda conv: conv(3, 4, 3)(torch.ones(1, 3, 5, 5).double()), "of one dtype on one device, got torch.float32"),
        (lambda conv: conv(3, 4, 3).to(torch.complex64)(torch.ones(1, 3, 5, 5).cfloat()), "complex64 is not supported"),
        (lambda conv: vmap(conv(3, 4, 3))(torch.ones(2, 1, 3, 5, 5)), "has no vmap"),
    ],
    ids=["same", "reflect", "groups", "one-image", "dtypes", "complex", "vmap"],
)
def test_what_is_not_supported_is_said(tried, make, message):
    with pytest.raises(RuntimeError, match=message):
        make(tried)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", runtime.DTYPES)
def test_it_compiles_ahead(tried, arch, dtype):
    (kernel,) = runtime.compile_ahead(NAME, G64.x_shape, G64.w_shape, padding=1, dtype=dtype, arch=arch)
    assert kernel.metadata.name == "mine_kernel"
    assert kernel.asm["cubin"]


# In the lab


def test_models_are_built_with_it_in_its_layout(tried):
    model = models.build("simplenet", NAME, 10, 32)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert {type(module) for module in convolutions} == {tried}
    assert models.memory_format(NAME) == torch.channels_last
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions)
    native = models.build("simplenet", "torch", 10, 32)
    native.load_state_dict(model.state_dict())
    x = random(2, 3, 32, 32, dtype=torch.float32, seed=1)
    torch.testing.assert_close(model(x), native(x))


def test_its_backend_is_tritons_also_where_its_file_is_gone():
    assert backend_of("gone", torch.device("cpu")) == "interpreter"
    assert backend_of("gone", torch.device("cuda")) == "compiled"
    assert {backend_of(conv, torch.device("cpu")) for conv in models.NATIVE} == {"native"}


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_its_memory_is_predicted_as_it_is_taken(tried, amp):
    step = Step(model="simplenet", conv=NAME, batch_size=2, image_size=16, amp=amp)
    predicted, real = rehearse(step, "cpu"), track(step, "cpu")
    peaks, taken = ({phase: of.peak.nbytes for phase, of in account.phases.items()} for account in (predicted, real))
    assert peaks == taken
    assert f"conv_lab.variant_{NAME}" in {storage.operator for storage in real.phases[FORWARD].peak.live}


def test_its_traffic_counts_as_a_convolutions(tried):
    steps = [Step(model="simplenet", conv=conv, batch_size=2, image_size=16) for conv in ("torch", NAME)]
    told = traffic_report(steps, GPUS["t4"])
    counted = [told["convolutions"][conv]["rows"]["convolution forward"] for conv in ("torch", NAME)]
    assert counted[0] == counted[1] > 0
    assert any(note.startswith("Launchers' buffers") for note in told["notes"])


# Its report card


def test_its_row_tells_what_its_code_tells_and_no_more(tried):
    found = row(NAME, G64, torch.float16, "ieee", "sm_80")
    ours = row("forward", G64, torch.float16, "ieee", "sm_80")
    assert (found.kernel, found.tile, found.warps, found.stages) == ("mine_kernel", (32, 64, 16), 4, 3)
    assert found.programs == 256 * 32 * 32 // 32
    assert found.tensor_core_instructions * 2048 == found.multiply_adds_a_pass
    assert (found.multiply_adds, found.bytes_requested, found.quantisation) == (None, None, None)
    assert found.useful_multiply_adds == ours.useful_multiply_adds
    assert found.compulsory_bytes == ours.compulsory_bytes
    assert found.bound_seconds >= found.roofline_seconds == ours.roofline_seconds
    assert found.overhead > ours.overhead


def test_a_kernel_that_does_not_tell_its_tile_is_refused(put):
    put("other", own_kernel.source(own_kernel.KERNEL).replace("BLOCK_K", "DEPTH"))
    with pytest.raises(ValueError, match="mine_kernel has no BLOCK_K"):
        row("other", G64, torch.float16, "ieee", "sm_80")


def test_the_card_shows_it_and_draws_it(tried, run_main, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shape = "256,64,32,32,64,3,3,1,1"
    code, out, _ = run_main(
        bench.report_card.command.main, "--shape", shape, "--op", NAME, "--arch", "sm_80", "--json", "card.json",
        "--details", "--figure", "card.png",
    )  # fmt: skip
    assert code == 0
    assert "? multiply-adds for 9,265,217,536 useful ones" in out
    assert "what a variant executes and asks for is not known" in out
    (entry,) = json.loads((tmp_path / "card.json").read_text())["rows"]
    assert (entry["op"], entry["multiply_adds"], entry["spills"]) == (NAME, None, 0)
    assert (tmp_path / "card.png").stat().st_size > 0
    several = ("--shape", shape, "--op", NAME, "forward", "--arch", "sm_80")
    code, out, _ = run_main(bench.report_card.command.main, *several)
    assert (code, "its bound is of useful products" in out) == (0, True)


# Files that are none


PARTIAL = """from functools import partial, update_wrapper
from kernels.variants import conv2d_by

def launch(x, w, bias, y, geometry, precision, tile):
    pass

Conv2d = conv2d_by(partial(launch, tile=1))
"""


def test_a_file_that_fails_late_leaves_nothing_behind(put):
    text = own_kernel.source(own_kernel.KERNEL) + "\n1 / 0\n"
    for _ in range(2):
        put("late", text)
        with pytest.raises(ValueError, match=r"late\.py, line \d+: ZeroDivisionError"):
            models.build("simplenet", "late")
        assert "late" not in variants.OPERATIONS
        with pytest.raises(ValueError, match="unknown operation 'late'"):
            runtime.compile_ahead("late", G64.x_shape, G64.w_shape)


def test_a_file_with_the_name_of_an_operation_does_not_shadow_it(put, run_main):
    put("forward", own_kernel.source(own_kernel.KERNEL))
    shape = ("--shape", "2,4,8,8,4,1,1", "--arch", "sm_80", "--op", "forward")
    code, out, err = run_main(bench.report_card.command.main, *shape)
    assert (code, err) == (0, "")
    assert "forward" in out


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("broken", "import torch\n\ndef forward(:\n", r"SyntaxError: .*line 3"),
        ("broken", "import torch\nimport not_there\n", r"broken\.py, line 2: ModuleNotFoundError: .*not_there"),
        ("broken", "x = 1\n", r"broken\.py: it has no Conv2d = conv2d_by"),
        ("broken", "from torch.nn import Conv2d\n", r"broken\.py: it has no Conv2d = conv2d_by"),
        ("triton", "x = 1\n", r"triton is a convolution that the lab knows already; give the file another"),
        ("inductor", "x = 1\n", r"inductor is a convolution that the lab knows already"),
        ("broken", "import sys\nsys.exit()\n", r"broken\.py, line 2: SystemExit"),
        ("broken", PARTIAL, r"broken\.py, line \d+: ValueError: conv2d_by takes a function that is defined in "),
        ("no-name", "x = 1\n", r"no-name\.py: Python cannot import a file of that name"),
        ("forward", None, r"forward\.py, line \d+: ValueError: an operation is called 'forward' already"),
    ],
    ids=[
        "syntax", "import", "empty", "not-ours", "reserved", "peer", "exit", "partial", "no-identifier", "an-operation",
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_harms_no_other(put, name, text, reason):
    put(name, own_kernel.source(own_kernel.KERNEL) if text is None else text)
    with pytest.raises(ValueError, match=reason) as refused:
        models.build("simplenet", name)
    assert str(refused.value).startswith(f"kernels/variants/{name}.py")
    assert models.CONVOLUTIONS["unfold"](3, 4, 3) is not None
    launched = runtime.compile_ahead("forward", G64.x_shape, G64.w_shape, padding=1)
    assert launched[-1].metadata.name == "forward_kernel"


def test_commands_tell_it_in_one_line(put, train_run, run_main):
    put("broken", "import not_there\n")
    why = re.escape("kernels/variants/broken.py, line 1: ModuleNotFoundError: No module named 'not_there'\n")
    for code, _, told in (
        train_run("simplenet", "--conv", "broken", "--device", "cpu"),
        run_main(bench.memory.command.main, "simplenet", "--predict", "--conv", "torch", "broken"),
        run_main(bench.report_card.command.main, "simplenet", "--op", "broken"),
    ):
        assert code == 2
        assert re.fullmatch(rf"[\w.]+: error: .*{why}", told)


def test_a_layer_that_a_variant_does_not_take_is_told_in_one_line(put, run_main):
    put("other", own_kernel.source(own_kernel.KERNEL).replace("if g.groups != 1:", "if g.R > 1:"))
    code, _, told = run_main(bench.report_card.command.main, "--shape", "1,8,8,8,8,3,3", "--op", "other")
    assert (code, told) == (2, "bench.report_card: error: other of conv3x3-8: mine: groups must be 1, got 1\n")


def test_a_checkpoint_whose_variant_is_gone_is_told_and_can_be_evaluated_by_another(trained_folder, tmp_path, run_main):
    saved = torch.load(trained_folder / "best.pt", weights_only=True)
    saved["settings"]["conv"] = "gone"
    torch.save(saved, tmp_path / "gone.pt")
    code, _, told = run_main(train.evaluate.main, "gone.pt", "--limit-val", 10, "--device", "cpu")
    assert code == 2
    assert "unknown convolution 'gone'" in told
    assert "there is no kernels/variants/gone.py" in told
    arguments = ("gone.pt", "--limit-val", 10, "--device", "cpu", "--conv", "torch")
    assert run_main(train.evaluate.main, *arguments)[0] == 0


def test_no_two_operations_have_one_name():
    with pytest.raises(ValueError, match="an operation is called 'forward' already"):
        runtime.operation("forward")


def test_the_lab_names_its_native_convolutions():
    """`NATIVE` is what tells a Triton convolution from PyTorch's operators, so it must not miss one."""
    of_the_lab = {name for name, cls in models.CONVOLUTIONS.items() if not issubclass(cls, variants.Variant)}
    assert of_the_lab - {"triton"} == set(models.NATIVE)
