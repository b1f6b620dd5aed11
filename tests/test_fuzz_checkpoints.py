"""Checkpoints that have rotted or were edited: refused in one line, or what they were, and never changed."""

import io
import shutil
import zipfile
from collections.abc import Callable

import pytest
import torch
from mutations import mutations
from torch import Tensor, nn

import attacks.run.command
import models
from models.files import load_tensors
from train import evaluate
from train.checkpoint import load_model
from train.cli import UserError

CPU = torch.device("cpu")


def saved(contents: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def whole(trained_folder) -> bytes:
    return (trained_folder / "best.pt").read_bytes()


@pytest.fixture(scope="module")
def contents(trained_folder) -> dict:
    return torch.load(trained_folder / "best.pt", weights_only=True)


@pytest.fixture
def judge(contents, tmp_path, recwarn) -> Callable[[bytes], str]:
    """judge(bytes) is "refused" or "same", what load_model makes of them; anything else fails."""
    path = tmp_path / "damaged.pt"

    def load(raw: bytes) -> str:
        path.write_bytes(raw)
        try:
            model, found = load_model(path, device=CPU)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
            return "refused"
        finally:
            assert not recwarn.list
        assert found.keys() == contents.keys()
        assert all(found[name] == contents[name] for name in contents.keys() - {"model"})
        for name, value in model.state_dict().items():
            assert torch.equal(value, contents["model"][name]), name
        return "same"

    return load


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("step", [pytest.param(16, id="16-kib"), pytest.param(1, id="1-kib", marks=pytest.mark.soak)])
def test_a_checkpoint_cut_anywhere_is_refused(step, whole, judge):
    for length in range(0, len(whole), 1024 * step):
        assert judge(whole[:length]) == "refused", length
    assert judge(whole[:-1]) == "refused"


@pytest.mark.parametrize("count", [pytest.param(100, id="few"), pytest.param(5000, id="many", marks=pytest.mark.soak)])
def test_bits_that_flip_are_noticed_or_without_effect(count, whole, judge):
    """PyTorch itself compares no checksum, and would load nearly all of these as other weights."""
    told = [judge(flipped(whole, i)) for i in range(count)]
    assert told.count("refused") > 0.9 * count


def flipped(whole: bytes, number: int) -> bytes:
    """One bit of `whole`: half of them anywhere, the others in its ends, where a zip says what is in it."""
    draw = torch.Generator().manual_seed(number)
    near_an_end = 4000
    places = (len(whole), near_an_end) if number % 2 else (len(whole), len(whole))
    place = int(torch.randint(places[number % 2], (), generator=draw))
    raw = bytearray(whole)
    raw[-place - 1 if number % 4 == 1 else place] ^= 1 << int(torch.randint(8, (), generator=draw))
    return bytes(raw)


def test_pytorch_alone_would_believe_a_flipped_bit(whole):
    """Why load_tensors compares checksums: when this fails, PyTorch does, and load_tensors need not."""
    raw = bytearray(whole)
    raw[len(raw) // 2] ^= 1
    believed = torch.load(io.BytesIO(bytes(raw)), weights_only=True)["model"]
    original = torch.load(io.BytesIO(whole), weights_only=True)["model"]
    assert not all(torch.equal(believed[name], original[name]) for name in original)


@pytest.mark.parametrize("count", [pytest.param(30, id="few"), pytest.param(1000, id="many", marks=pytest.mark.soak)])
def test_blocks_that_a_disk_lost_are_noticed(count, whole, judge):
    for i in range(count):
        start = i * (len(whole) - 512) // count
        raw = whole[:start] + bytes(512) + whole[start + 512 :]
        assert judge(raw) == ("same" if raw == whole else "refused"), start


@pytest.mark.parametrize("count", [pytest.param(40, id="few"), pytest.param(1500, id="many", marks=pytest.mark.soak)])
def test_other_damage_is_refused_or_without_effect(count, whole, judge):
    for raw in mutations(whole, count, seed="checkpoint"):
        judge(raw)


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "byteorder", "version"])
def test_a_zip_without_one_of_its_members_is_refused(member, whole, judge):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        names = [info.filename for info in old.infolist()]
        assert any(name.endswith(f"/{member}") for name in names)
        for name in names:
            if not name.endswith(f"/{member}"):
                new.writestr(name, old.read(name))
    # PyTorch does without the byte order, which is this machine's then.
    assert judge(file.getvalue()) == ("same" if member == "byteorder" else "refused")


# ---------------------------------------------------------------- contents


def first_weight(change: Callable[[Tensor], object]) -> Callable[[dict], dict]:
    def changed(contents: dict) -> dict:
        name, value = next(iter(contents["model"].items()))
        return contents | {"model": contents["model"] | {name: change(value.clone())}}

    return changed


def setting(**changes: object) -> Callable[[dict], dict]:
    return lambda contents: contents | {"settings": contents["settings"] | changes}


def part(**changes: object) -> Callable[[dict], dict]:
    return lambda contents: contents | changes


WRONG = {
    **{
        f"{name}={value!r}": setting(**{name: value})
        for name, values in {
            "image_size": ["32", -1, 0, 10**9, 3.5, True, None, [32], float("nan")],
            "conv": ["nosuch", "", None, 3, {"conv": "torch"}],
            "model": ["nosuch", None, 5],
            "data": [None, 5, []],
            "amp": ["fp8", None, {}],
            "fuse": ["yes", 1, None],
            "lr": ["0.1", float("nan"), float("inf"), 10**400],
            "batch_size": [0, -1, 1.5, 10**30],
            "unknown": [1],
        }.items()
        for value in values
    },
    **{
        f"{name} is {str(value)[:12]}": part(**{name: value})
        for name, values in {
            "classes": [None, 5, "abcdefghij", {}, list(range(10)), ["a"], ["a"] * 10**4],
            "settings": [None, 5, [], torch.zeros(3)],
            "model": [None, 5, [], {}, {1: torch.zeros(1)}, torch.zeros(3)],
            "epoch": [None, "1", -1, True, float("nan"), torch.tensor(1)],
            "format": [None, "2", 1, 3, [2]],
        }.items()
        for value in values
    },
    "nan": first_weight(lambda w: w * float("nan")),
    "infinite": first_weight(lambda w: w / 0),
    "float64": first_weight(Tensor.double),
    "float16": first_weight(Tensor.half),
    "float8": first_weight(lambda w: w.to(torch.float8_e4m3fn)),
    "complex": first_weight(lambda w: w.to(torch.complex64)),
    "whole": first_weight(Tensor.long),
    "sparse": first_weight(Tensor.to_sparse),
    "meta": first_weight(lambda w: w.to("meta")),
    "quantised": first_weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
    "nested": first_weight(lambda w: torch.nested.nested_tensor([w[0], w[1]])),
    "terabytes": first_weight(lambda w: torch.zeros(1).expand(10**6, 10**6)),
    "shape": first_weight(lambda w: w[:1]),
    "scalar": first_weight(lambda w: torch.tensor(1.0)),
    "text": first_weight(lambda w: "x"),
    "nothing": lambda contents: None,
    "list": lambda contents: [contents],
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what is made here
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_have_been_saved_is_refused_in_one_line(name, contents, run_main, tmp_path):
    (tmp_path / "x.pt").write_bytes(saved(WRONG[name](contents)))
    code, out, err = run_main(evaluate.main, "x.pt", "--device", "cpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("train.evaluate: error: ")
    assert "x.pt" in err


@pytest.mark.parametrize(
    "arguments",
    [("pgd",), ("sweep",), ("saliency",), ("robust", "--epochs", 1)],
    ids=lambda arguments: arguments[0],
)
def test_every_attack_refuses_a_rotten_checkpoint(arguments, whole, run_main, tmp_path):
    raw = bytearray(whole)
    raw[len(raw) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(raw)
    attack, *options = arguments
    code, out, err = run_main(attacks.run.command.main, attack, "x.pt", *options, "--device", "cpu", "--out", "o")
    assert (code, out) == (2, "")
    assert err.endswith("error: x.pt is damaged or is no checkpoint (BadZipFile)\n")
    assert err.count("\n") == 1
    assert (tmp_path / "x.pt").read_bytes() == raw


# ---------------------------------------------------------------- the position in last.pt


def within(name: str, **changes: object) -> Callable[[dict], dict]:
    return lambda contents: contents | {name: contents[name] | changes}


def in_optimizer(change: Callable[[dict, list[dict]], object]) -> Callable[[dict], dict]:
    """`change` is given the states by parameter, and the groups."""

    def changed(contents: dict) -> dict:
        change(contents["optimizer"]["state"], contents["optimizer"]["param_groups"])
        return contents

    return changed


UNDER_WAY = {"epoch": 5, "batch": 10, "step": 60}  # where steps_per_epoch is 10: before the sixth validation
WRONG_POSITIONS = {
    **{
        f"{name} is {str(value)[:18]}": part(**{name: value})
        for name, values in {
            "batch": [None, -1, "1", 1.0, True, 11, 3, torch.tensor(0)],
            "step": [None, 999, "60", 60.0],
            "epoch": [7, 2**62],
            "timing": [None, 5, {}, []],
            "best": [None, 5, {}],
            "meter": [None, [0] * 4, torch.zeros(3), torch.zeros(4), torch.zeros(4, dtype=torch.float64) / 0],
            "scaler": [None, {"scale": 1.0}],
            "trained_model": [{}],
            "optimizer": [None, 5, {}],
            "data": [None, 5],
        }.items()
        for value in values
    },
    **{f"seconds={x}": within("timing", seconds=x) for x in (float("nan"), float("inf"), -1.0, "1", None)},
    "images=0.5": within("timing", images=0.5),
    "no-time-at-all": within("timing", total_seconds=0.0),
    "more-times": within("timing", hours=1.0),
    "epoch-without-time": part(**UNDER_WAY, meter=torch.ones(4, dtype=torch.float64)),
    "epoch-without-images": lambda contents: within("timing", seconds=1.0)(contents) | UNDER_WAY,
    **{f"best-epoch={x}": within("best", epoch=x) for x in (-1, "1", 7)},
    **{f"best-top1={x}": within("best", val_top1=x) for x in (float("nan"), 101.0, None)},
    "float64-weights": first_weight(Tensor.double),
    "weights-of-another-shape": first_weight(lambda w: w[:1]),
    "betas": in_optimizer(lambda _, groups: groups[0].update(betas="x")),
    "no-betas": in_optimizer(lambda _, groups: groups[0].pop("betas")),
    "no-decay": in_optimizer(lambda _, groups: groups[0].update(weight_decay=0.0)),
    "lr": in_optimizer(lambda _, groups: groups[0].update(lr=float("nan"))),
    "two-groups": in_optimizer(lambda _, groups: groups.append(groups[0])),
    "parameters-exchanged": in_optimizer(lambda _, groups: groups[0]["params"].reverse()),
    "no-states": in_optimizer(lambda states, _: states.clear()),
    "no-state-of-one": in_optimizer(lambda states, _: states.pop(3)),
    "states-before-a-step": part(epoch=0, step=0, best={"epoch": 0, "val_top1": -1.0}),
    "state-without-a-part": in_optimizer(lambda states, _: states[0].pop("exp_avg")),
    **{
        f"{name}-{kind}": in_optimizer(lambda states, _, name=name, value=value: states[0].update({name: value}))
        for name in ("exp_avg", "exp_avg_sq", "step")
        for kind, value in {"nothing": None, "shape": torch.zeros(2), "text": "x", "list": [[1.0]]}.items()
    },
    "float64-state": in_optimizer(lambda states, _: states[0].update(exp_avg=states[0]["exp_avg"].double())),
}


@pytest.mark.parametrize(
    "name",
    [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(WRONG_POSITIONS)],
)
def test_what_cannot_be_a_position_is_never_gone_on_from(name, trained_folder, train_run, tmp_path):
    folder = shutil.copytree(trained_folder, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    contents = torch.load(folder / "last.pt", weights_only=True)
    raw = saved(WRONG_POSITIONS[name](contents))
    (folder / "last.pt").write_bytes(raw)
    code, _, err = train_run("--resume", "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert "run/last.pt is damaged: " in err or (name.startswith("data") and "images of" in err)
    assert (folder / "last.pt").read_bytes() == raw
    assert not (folder / "summary.json").exists()


# ---------------------------------------------------------------- pretrained weights


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    return models.build("resnet18", "torch", 10)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w * float("nan"), "is damaged: not every value of bn1.weight is a finite number"),
        (lambda w: w.to_sparse(), "holds no state_dict"),
        (lambda w: w.to("meta"), "holds no state_dict"),
        (lambda w: w.to(torch.complex64), "holds no state_dict"),
        (lambda w: torch.nested.nested_tensor([w, w]), "holds no state_dict"),
        (lambda w: torch.zeros(1).expand(10**6, 10**6), "is no ResNet18: bn1.weight is (1000000, 1000000)"),
    ],
    ids=["nan", "sparse", "meta", "complex", "nested", "terabytes"],
)
def test_pretrained_weights_that_are_none_are_refused(change, words, pretrained, tmp_path):
    state = pretrained.state_dict()
    torch.save(state | {"bn1.weight": change(state["bn1.weight"])}, tmp_path / "w.pth")
    with pytest.raises(ValueError) as error:
        models.load_pretrained(pretrained, "resnet18", tmp_path / "w.pth")
    assert f"{tmp_path / 'w.pth'} {words}" in str(error.value)


def test_pretrained_weights_with_a_flipped_bit_are_refused(pretrained, train_run, tmp_path):
    torch.save(pretrained.state_dict(), tmp_path / "w.pth")
    raw = bytearray((tmp_path / "w.pth").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "w.pth").write_bytes(raw)
    code, _, err = train_run("resnet18", "--conv", "torch", "--device", "cpu", "--weights", "w.pth", "--out", "run")
    assert (code, err) == (2, f"train.run: error: {tmp_path}/w.pth is damaged or holds no weights (BadZipFile)\n")
    assert not (tmp_path / "run").exists()


def test_weights_from_before_pytorch_1_6_are_read(pretrained, tmp_path):
    state = pretrained.state_dict()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert load_tensors(tmp_path / "w.pth").keys() == state.keys()
