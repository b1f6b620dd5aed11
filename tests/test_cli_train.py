"""The training command: help a newcomer understands, and one line for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

import train.run
from bench.memory import command as memory
from train import compare, diagram, evaluate

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["alexnet"], ["alexnet", "simplenet"], id="unknown-model"),
        pytest.param([], ["name a model", "simplenet"], id="no-model"),
        pytest.param(["simplenet", "--conv", "fft"], ["--conv", "fft", "triton"], id="unknown-conv"),
        pytest.param(["simplenet", "--recipe", "magic"], ["--recipe", "magic", "writeup"], id="unknown-recipe"),
        pytest.param(["simplenet", "--device", "tpu"], ["--device", "tpu", "cuda"], id="unknown-device"),
        pytest.param(["simplenet", "--colour", "red"], ["--colour"], id="unknown-flag"),
        pytest.param(["simplenet", "--epoch", "3"], ["--epoch"], id="abbreviated-flag"),
        pytest.param(["simplenet", "--epochs", "0"], ["--epochs", "0"], id="zero-epochs"),
        pytest.param(["simplenet", "--epochs", "-3"], ["--epochs", "-3"], id="negative-epochs"),
        pytest.param(["simplenet", "--epochs", "2.5"], ["--epochs", "2.5", "whole"], id="fractional-epochs"),
        pytest.param(["simplenet", "--epochs"], ["--epochs"], id="epochs-without-value"),
        pytest.param(["simplenet", "--batch-size", "0"], ["--batch-size", "0"], id="zero-batch"),
        pytest.param(["simplenet", "--lr", "0"], ["--lr", "0"], id="zero-lr"),
        pytest.param(["simplenet", "--lr", "nan"], ["--lr", "nan"], id="lr-nan"),
        pytest.param(["simplenet", "--lr", "fast"], ["--lr", "fast"], id="lr-word"),
        pytest.param(["simplenet", "--image-size", "4"], ["--image-size", "4", "8"], id="tiny-images"),
        pytest.param(["simplenet", "--limit-train", "0"], ["--limit-train", "0"], id="zero-limit"),
        pytest.param(["simplenet", "--seed", "-1"], ["--seed", "-1"], id="negative-seed"),
        pytest.param(["simplevit", "--image-size", "36"], ["image size 36", "multiple of 8"], id="size-of-the-vit"),
        pytest.param(["simplenet", "--weights", "imagenet"], ["--weights", "resnet18 only"], id="weights-of-another"),
        pytest.param(["resnet18", "--weights", "no.pth"], ["--weights no.pth: no such file"], id="missing-weights"),
        pytest.param(["simplenet", "--init", "no.pt"], ["--init no.pt: no such file"], id="missing-init"),
        pytest.param(["simplenet", "--amp", "int8"], ["--amp", "bf16"], id="unknown-amp"),
        pytest.param(["simplenet", "--data", "nowhere"], ["nowhere"], id="missing-data"),
        pytest.param(["simplenet", "--out", "file/run"], ["file/run"], id="out-below-a-file"),
        pytest.param(["simplenet", "--out", "file"], ["file"], id="out-is-a-file"),
        pytest.param(["simplenet", "--out", "/proc/run"], ["/proc/run"], id="out-not-writable"),
        pytest.param(["simplenet", "--out", "old"], ["old", "already holds a run", "--resume"], id="out-in-use"),
        pytest.param(["--resume", "nowhere"], ["nowhere"], id="resume-nothing"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, words, train_run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = train_run(*arguments)
    assert code == 2
    assert err.startswith("train.run: error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", [None, "deep/down/run"])
@pytest.mark.parametrize("broken", ["empty class", "truncated image"])
def test_bad_data_leaves_no_run_folder(out, broken, train_run, make_images, tmp_path):
    root = make_images(tmp_path / "d", {"cat": 6, "dog": 0 if broken == "empty class" else 6})
    if broken == "truncated image":
        path = root / "dog/003.jpg"
        path.write_bytes(path.read_bytes()[:-100])
    arguments = ["simplenet", "--conv", "torch", "--data", "d", "--image-size", "16"]
    code, _, err = train_run(*arguments, *(["--out", out] if out else []))
    assert code == 2
    assert err.count("\n") == 1
    assert "dog" in err
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_an_existing_empty_folder_is_used_and_kept(train_run, tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    assert train_run("simplenet", "--data", "nowhere", "--out", "run")[0] == 2
    assert (tmp_path / "run").is_dir()
    assert train_run(*tiny_run, "--epochs", "1", "--out", "run")[0] == 0


def test_cuda_without_a_gpu_is_said_plainly(train_run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = train_run("simplenet", "--device", "cuda")
    assert (code, err) == (2, "train.run: error: --device cuda: PyTorch finds no GPU here\n")


@pytest.mark.parametrize("command", [train.run, compare, evaluate, diagram, memory], ids=lambda m: m.__name__)
def test_help_explains_every_flag_in_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = command.make_parser()
    assert max(map(len, parser.format_help().splitlines())) <= 80
    assert f"python -m {command.__name__.removesuffix('.command')} " in parser.format_help()
    assert all(action.help for action in parser._actions)


def test_brackets_in_a_path_are_no_markup(train_run, tiny_run, tmp_path):
    code, out, _ = train_run(*tiny_run, "--out", "a[/b]/c[red]")
    assert code == 0
    assert out.count("a[/b]/c[red]") == 2
    assert (tmp_path / "a[/b]/c[red]/summary.json").exists()


def test_fewer_training_images_than_classes_are_refused(train_run, tiny_run, tmp_path):
    code, _, err = train_run(*tiny_run, "--limit-train", "9", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "--limit-train 9 would leave some of the 10 classes without an image" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--out", "--data", "--cache", "--init", "--resume", "--weights"])
def test_a_home_that_nobody_has_is_one_line(flag, train_run):
    code, _, err = train_run("simplenet", flag, "~nobody-at-all/x")
    assert (code, err.count("\n")) == (2, 1)
    assert f"argument {flag}: ~nobody-at-all/x: " in err


def test_a_model_with_batch_norms_does_not_train_on_one_image_a_step(train_run, tiny_run, tmp_path):
    others = tiny_run[1:]
    code, _, err = train_run("customnet", *others, "--batch-size", "1", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "customnet has a batch norm that cannot train on one image of 32 px a step" in err
    assert not (tmp_path / "run").exists()
    assert train_run("simplenet", *others, "--batch-size", "1", "--limit-train", "10", "--out", "run")[0] == 0


def test_the_command_runs_as_typed():
    """As its own process: exit code, and nothing but one line on stderr."""
    command = [sys.executable, "-m", "train.run"]
    bad = subprocess.run([*command, "alexnet"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    assert "Traceback" not in bad.stderr
    good = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0
    assert "--resume" in good.stdout
