"""`torchrun -m train.run`: several processes train as one, and end together."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    "--conv", "torch", "--device", "cpu", "--optimizer", "sgd", "--lr", "0.01", "--epochs", "2",
    "--batch-size", "16", "--limit-train", "64", "--limit-val", "21",
)
ACCURACIES = ("train_top1", "train_top5", "val_top1", "val_top5")


def torchrun(folder: Path, *arguments: object, processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    """Started in `folder`."""
    launcher = (
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--max-restarts", restarts,
        "-m", "train.run",
    )
    command = [sys.executable, *map(str, (*launcher, *arguments))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def our_lines(err: str) -> list[str]:
    """What the lab itself said, without the launcher's own report."""
    return [line for line in err.splitlines() if line.startswith("train.run: error:")]


def workers_of(agent: subprocess.Popen) -> list[int]:
    """The training processes that a torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    found = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = child
    return [found[rank] for rank in sorted(found)]


# On photographs, here of noise: garments lie on plain black, where rounding decides which of equal pixels a max-pool
# takes. Batch norms over a few similar images amplify rounding from step to step, so CustomNet makes few and small
# ones; that its gradients agree in float64 is shown in tests/test_distributed.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "epochs", "lr", "tolerance"), [("simplenet", 2, 0.01, 1e-6), ("customnet", 1, 1e-5, 1e-3)]
)
def test_two_processes_train_as_one_with_the_same_global_batch(
    model, epochs, lr, tolerance, make_images, train_run, tmp_path
):
    counts = {"train/cat": 32, "train/dog": 32, "val/cat": 11, "val/dog": 10}
    data = make_images(tmp_path / "noise", counts, size=(36, 36))
    arguments = (model, *COMMON, "--epochs", epochs, "--lr", lr, "--data", data, "--image-size", 32)
    process = torchrun(tmp_path, *arguments, "--out", "two")
    assert train_run(*arguments, "--out", "one")[0] == 0
    code, out, err = finish(process)
    assert code == 0, err
    assert "2 processes" in out
    assert out.count(f"epoch {epochs}/{epochs}") == 1  # rank 0 alone speaks
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two"))
    assert one["model"].keys() == two["model"].keys()
    for name, weights in one["model"].items():
        torch.testing.assert_close(
            two["model"][name], weights, rtol=10 * tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    for a, b in zip(rows(tmp_path / "one/steps.csv"), rows(tmp_path / "two/steps.csv"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=tolerance)
    for a, b in zip(rows(tmp_path / "one/metrics.csv"), rows(tmp_path / "two/metrics.csv"), strict=True):
        if model == "simplenet":  # each validation image is counted once, though 21 do not split evenly
            assert [a[column] for column in ACCURACIES] == [b[column] for column in ACCURACIES]
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=tolerance)
    assert json.loads((tmp_path / "two/summary.json").read_text())["processes"] == 2


# An attack goes by signs: a gradient that rounding turns moves a pixel by two steps. SimpleNet bears that; CustomNet's
# batch norms amplify it, so tests/test_distributed.py holds its adversarial step to one process's in float64.
@pytest.mark.slow
def test_two_processes_train_adversarially_as_one(make_images, train_run, tmp_path):
    counts = {"train/cat": 32, "train/dog": 32, "val/cat": 11, "val/dog": 10}
    data = make_images(tmp_path / "noise", counts, size=(36, 36))
    arguments = (
        "simplenet", *COMMON, "--epochs", 1, "--lr", 1e-5, "--data", data, "--image-size", 32, "--adversarial"
    )
    process = torchrun(tmp_path, *arguments, "--out", "two")
    assert train_run(*arguments, "--out", "one")[0] == 0
    code, _, err = finish(process)
    assert code == 0, err
    one, two = ([float(row["loss"]) for row in rows(tmp_path / name / "steps.csv")] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_told_by_one_process_alone(tmp_path):
    """Past a limit of file sizes, which a full disk is to whoever writes."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
    limited += "from train.run import main; main(sys.argv[1:])"
    (tmp_path / "limited.py").write_text(limited)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(tmp_path / "limited.py"), "simplenet", *COMMON, "--out", "run",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _, _, err = finish(process)
    assert our_lines(err) == ["train.run: error: run/last.pt: File too large"]


@pytest.mark.slow
def test_an_attack_of_no_size_in_two_processes_trains_to_the_bits_of_the_plain_copy(tmp_path):
    """Reducer and synchronised norms included, which must take no notice of what is crafted in between."""
    for name, flags in (("plain", ()), ("ours", ("--adversarial", "--adversarial-epsilon", 0))):
        code, _, err = finish(torchrun(tmp_path, "customnet", *COMMON, "--epochs", 1, *flags, "--out", name))
        assert code == 0, err
    plain, ours = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("plain", "ours"))
    for name, value in plain.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.slow
def test_a_batch_that_does_not_split_evenly_is_one_line(tmp_path):
    """And a restart, which would come to the same, does not tell it again."""
    run = torchrun(tmp_path, "simplenet", *COMMON, "--batch-size", "15", "--out", "run", restarts=1)
    code, _, err = finish(run)
    assert code != 0
    assert our_lines(err) == ["train.run: error: a batch of 15 images does not split evenly over 2 processes"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistyped_flag_is_told_once(tmp_path):
    code, _, err = finish(torchrun(tmp_path, "simplenet", "--batch-size", "none"))
    assert code != 0
    assert len(our_lines(err)) == 1


# At every moment of SIGTERM, and faster: tests/test_faults_processes.py.
@pytest.mark.parametrize(
    "rank", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.soak)]
)
def test_a_rank_that_dies_ends_all_with_one_message(rank, tmp_path):
    process = torchrun(tmp_path, "simplenet", *COMMON, "--epochs", "400", "--out", "run")
    kill_worker(process, rank, tmp_path / "run")
    code, _, err = finish(process)
    assert code != 0
    (line,) = our_lines(err)
    assert "another process of this run ended" in line
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["step"] > 0


def kill_worker(process: subprocess.Popen, rank: int, folder: Path) -> None:
    """SIGKILL, after the first epoch."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.csv").exists() or len(rows(folder / "metrics.csv")) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(workers_of(process)[rank], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "out"), [(0, "run"), (1, None)], ids=["named-folder", "default-folder"])
def test_torchruns_restart_goes_on_by_itself(rank, out, tmp_path):
    arguments = ("simplenet", *COMMON, "--epochs", "12")
    code, _, err = finish(torchrun(tmp_path, *arguments, "--out", "whole"))
    assert code == 0, err
    process = torchrun(tmp_path, *arguments, *(["--out", out] if out else []), restarts=1)
    folder = tmp_path / process.stdout.readline().rpartition("run folder ")[2].strip()
    kill_worker(process, rank, folder)
    code, text, err = finish(process)
    assert code == 0, err
    assert "going on after step" in text
    whole, again = (torch.load(path / "last.pt", weights_only=True) for path in (tmp_path / "whole", folder))
    for name, weights in whole["model"].items():
        assert torch.equal(again["model"][name], weights), name
