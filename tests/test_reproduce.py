"""The reproducing command: its plan, how its stages are run and gone on with, and the report that comes of them."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from bench.reproduce import check, command
from bench.reproduce.page import table, to_html
from bench.reproduce.plan import CONVOLUTIONS, Scope, Stage, make_plan
from bench.reproduce.report import SECTIONS, make_markdown, write_report
from bench.reproduce.results import Results
from bench.reproduce.stages import FOLDER, Outcome, outcome_of, run_all
from train import writeup
from train.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
QUICK = Scope(quick=True, data="fashion-mini", device="cpu", weights="none")
FULL = Scope(quick=False, data="/images", device="cuda", weights="imagenet")
ABOUT = {
    "command": "python -m bench.reproduce", "ended": "2026-11-26T12:00:00+00:00", "device": "CPU", "torch_threads": 1,
    "versions": {"torch": "2.14.1"}, "commit": None,
}  # fmt: skip
PARSERS = {
    "bench.reproduce.check": check.make_parser,
    **{
        name: lambda name=name: importlib.import_module(name).make_parser()
        for name in ("train.run", "train.compare", "train.diagram")
    },
    "bench.memory": lambda: importlib.import_module("bench.memory.command").make_parser(),
    "attacks.run": lambda: importlib.import_module("attacks.run.command").make_parser(),
}


def stage(name: str, *arguments: str, module: str = "timeit", **more) -> Stage:
    """Python's own timeit, which runs what it is given: a stage that takes no second."""
    return Stage(name=name, title=f"the {name}", module=module, arguments=("-n1", "-r1", *arguments), **more)


def run(stages: list[Stage], out: Path) -> tuple[dict[str, Outcome], list[str]]:
    """Outcomes, and the stages that really ran."""
    ran: list[str] = []
    outcomes = run_all(stages, out, lambda stage: ran.append(stage.name), lambda *_: None, lambda *_: None)
    return outcomes, ran


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("scope", [QUICK, FULL], ids=["quick", "full"])
def test_every_command_of_the_plan_is_one(scope, tmp_path):
    stages = make_plan(scope, tmp_path)
    for one in stages:
        PARSERS[one.module]().parse_args(one.arguments)  # exits where a flag does not exist
    names = [one.name for one in stages]
    assert len(set(names)) == len(names)
    assert {f"{model}-{conv}" for model in models.MODELS for conv in CONVOLUTIONS} < set(names)
    for number, one in enumerate(stages):
        assert set(one.needs) <= set(names[:number])


def test_the_full_plan_follows_the_writeup(tmp_path):
    stages = {one.name: one for one in make_plan(FULL, tmp_path)}
    for name in ("simplenet-torch", "simplevit-unfold", "resnet18-triton"):
        arguments = stages[name].arguments
        assert arguments[arguments.index("--recipe") + 1] == "writeup"
        assert "--epochs" not in arguments  # the recipe's
        assert "--limit-train" not in arguments
        assert arguments[arguments.index("--image-size") + 1] == "128"
    assert "imagenet" in stages["resnet18-torch"].arguments
    assert stages["pretrain"].arguments[stages["pretrain"].arguments.index("--epochs") + 1] == "30"
    assert stages["robust"].arguments[stages["robust"].arguments.index("--epochs") + 1] == "10"
    assert stages["sweep"].arguments[stages["sweep"].arguments.index("--conv") + 1] == "triton"
    assert "memory-gpu" in stages
    assert "memory-gpu" not in {one.name for one in make_plan(QUICK, tmp_path)}


# ---------------------------------------------------------------- running


def test_what_ended_well_is_not_run_again(tmp_path):
    first, second = stage("first", "print('told')"), stage("second", "1 / 0")
    outcomes, ran = run([first, second], tmp_path)
    assert ran == ["first", "second"]
    assert outcomes["first"].reason is None
    assert outcomes["second"].reason == "ZeroDivisionError: division by zero"
    assert "told" in (tmp_path / FOLDER / "first.txt").read_text()
    assert run([first, second], tmp_path)[1] == ["second"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert run([first, second], moved)[1] == ["second"]
    moved.rename(tmp_path)
    assert run([stage("first", "print('other')"), second], tmp_path)[1] == ["first", "second"]


def test_a_failure_fails_what_needs_it_and_nothing_else(tmp_path):
    stages = [stage("first", "1 / 0"), stage("second", "1", needs=("first",)), stage("third", "1")]
    outcomes, ran = run(stages, tmp_path)
    assert ran == ["first", "third"]
    assert outcomes["second"].reason == "it needs first, which failed"
    assert outcomes["third"].reason is None


def test_a_commands_own_error_is_the_reason(tmp_path):
    broken = Stage(name="run", title="run", module="train.compare", arguments=("nowhere",))
    outcomes, _ = run([broken], tmp_path)
    assert outcomes["run"].reason == "no run folder nowhere"


def test_one_that_was_killed_says_so(tmp_path):
    outcomes, _ = run([stage("killed", "import os; os.kill(os.getpid(), 9)")], tmp_path)
    assert outcomes["killed"].reason == "ended by SIGKILL"


def test_a_training_that_has_begun_is_gone_on_with(tmp_path):
    one = {one.name: one for one in make_plan(QUICK, tmp_path)}["simplenet-torch"]
    assert one.command == ["-m", "train.run", *one.arguments]
    one.run_folder.mkdir(parents=True)
    (one.run_folder / "config.json").write_text("{}")
    assert one.command == ["-m", "train.run", "--resume", str(one.run_folder)]
    assert one.typed(tmp_path).endswith("--out DIR/runs/simplenet-torch")
    with pytest.raises(UserError, match="holds a run of another command"):
        outcome_of(one, tmp_path)  # no stage of ours began it


def test_a_damaged_outcome_is_told(tmp_path):
    one = stage("first", "1")
    run([one], tmp_path)
    (tmp_path / FOLDER / "first.json").write_text("{")
    with pytest.raises(UserError, match=r"first\.json is damaged"):
        outcome_of(one, tmp_path)


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(tmp_path):
    """SIGTERM to the command while a training runs: one line, and the training is resumed by the same command."""
    script = (
        "from bench.reproduce import command, plan\n"
        "plan.QUICK_EPOCHS, plan.QUICK_TRAIN, plan.QUICK_VAL = 3, 200, 20\n"
        "make = command.make_plan\n"
        "command.make_plan = lambda *a: [s for s in make(*a) if s.name == 'simplenet-torch']\n"
        "command.main(['--quick', '--out', 'out'])\n"
    )

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    steps = tmp_path / "out/runs/simplenet-torch/steps.csv"
    first = start()
    while not (steps.exists() and steps.read_text().count("\n") > 2):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 2
    assert errors == "bench.reproduce: error: interrupted; the same command goes on in out\n"
    done = steps.read_text()
    assert (tmp_path / "out/runs/simplenet-torch/last.pt").exists()

    second = start()
    out, errors = second.communicate(timeout=300)
    assert second.returncode == 0, out + errors
    assert steps.read_text().startswith(done)
    assert steps.read_text().count("\n") == 1 + 3 * (200 // 32)  # a last batch that is not whole is left out
    assert "43.92" in (tmp_path / "out/REPORT.md").read_text()


# ---------------------------------------------------------------- the folder


def test_a_folder_belongs_to_one_scope_and_one_process(tmp_path):
    out = tmp_path / "out"
    with command.claimed(out, QUICK), pytest.raises(UserError, match="another process is working in"):  # noqa: SIM117
        with command.claimed(out, QUICK):
            pass
    with pytest.raises(UserError, match=r"was begun with --quick True, --data fashion-mini"):  # noqa: SIM117
        with command.claimed(out, FULL):
            pass
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):  # noqa: SIM117
        with command.claimed(tmp_path, QUICK):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), r"nowhere"),
        (("--weights", "nowhere.pth"), r"--weights nowhere\.pth: no such file"),
        (("--device", "gpu"), r"invalid choice: 'gpu'"),
    ],
)
def test_a_mistake_is_one_line(run_main, arguments, message):
    code, _, err = run_main(command.main, "--quick", *arguments)
    assert code == 2
    assert re.search(message, err)
    assert err.count("\n") == 1


# ---------------------------------------------------------------- the check


def test_the_check_finds_a_wrong_gradient(monkeypatch):
    from bench.reproduce.accuracy import large

    class Wrong(nn.Conv2d):
        def _conv_forward(self, x, *operands):
            return super()._conv_forward(x * 0.5 + x.detach() * 0.5, *operands)

    monkeypatch.setitem(models.CONVOLUTIONS, "unfold", Wrong)
    monkeypatch.setattr(check, "X_SHAPE", (1, 3, 8, 8))
    monkeypatch.setattr(check, "CHANNELS", 2)
    report = check.check(torch.device("cpu"))
    told = large(report)
    assert len(told) == len(check.CASES)
    assert all("unfold" in line and "input gradient" in line for line in told)
    assert "Jacobian mismatch" in report["gradcheck"]["unfold"]["failed"]
    assert report["gradcheck"]["triton"]["failed"] is None


# ---------------------------------------------------------------- the report


def results(out: Path, scope: Scope = QUICK, outcomes: dict | None = None) -> tuple[Results, list[Stage]]:
    stages = make_plan(scope, out)
    failed = {one.name: Outcome(command=one.typed(out), seconds=1.0, reason="the disk is full") for one in stages}
    return Results(out=out, scope=scope, outcomes=failed | (outcomes or {})), stages


def rows_of(markdown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in markdown.splitlines() if line.startswith("|")
    ]


def test_without_results_every_cell_says_why(tmp_path):
    markdown = make_markdown(*results(tmp_path), ABOUT)
    assert all(all(row) for row in rows_of(markdown))
    assert [line for line in markdown.splitlines() if line.startswith("## ")] == [
        *(f"## {i}. {title}" for i, (title, _) in enumerate(SECTIONS, start=1)), "## 9. How it was made"
    ]
    assert markdown.count("not available: the disk is full") > 100
    assert "nan" not in markdown.lower().split()
    assert "None" not in markdown


def test_every_figure_of_the_writeup_stands_in_the_report(tmp_path):
    markdown = make_markdown(*results(tmp_path), ABOUT)
    named = (writeup.SIMPLENET, writeup.SIMPLENET_UNFOLD, writeup.SIMPLEVIT, writeup.CUSTOMNET,
             writeup.RESNET18_FINE_TUNED)  # fmt: skip
    pairs = [(row.top1, row.top5) for row in named]
    pairs += [pair for row in writeup.UNDER_ATTACK.values() for pair in row.values()]
    pairs += [pair for row in writeup.HARDENED.values() for pair in row] + list(writeup.BETTER.values())
    for top1, top5 in pairs:
        assert f"{top1:.2f} / {top5:.2f}" in markdown
    for row in named:
        assert f"| {row.epochs} |" in markdown
        assert f"{row.mib:,}" in markdown
    for count in writeup.PARAMETERS.values():
        assert markdown.count(f"| {count:,} | {count:,} |") == 1  # ours is theirs


def test_trainings_are_read_from_their_folders(tmp_path, trained_folder):
    name = "customnet-unfold"
    shutil.copytree(trained_folder, tmp_path / "runs" / name)
    fine = Outcome(command="", seconds=1.0, reason=None)
    found, stages = results(tmp_path, outcomes={name: fine})
    summary = json.loads((trained_folder / "summary.json").read_text())
    files = write_report(found, stages, ABOUT)
    markdown = files[0].read_text()
    row = next(row for row in rows_of(markdown) if row[:2] == ["CustomNet", "unfold, native"])
    assert row[2] == f"{summary['val_top1']:.2f} / {summary['val_top5']:.2f}"
    assert row[3] == "6"
    assert row[4] == "no such run"
    assert f"{summary['train_images']:,} training and {summary['val_images']:,} validation images" in markdown
    page = files[1].read_text()
    assert page.count("<img") == 1
    assert 'src="data:image/png;base64,' in page
    assert f"runs/{name}/curves.png" in markdown


def test_a_picture_that_is_gone_is_said_to_be(tmp_path):
    found, _ = results(tmp_path, outcomes={"compare": Outcome(command="", seconds=1.0, reason=None)})
    assert found.figure("compare", "compare/compare.png", "All") == "**All** not available: compare/compare.png is gone"


def test_tables_refuse_what_is_empty():
    assert table(("a", "b"), [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
    for row in (["x"], ["x", ""]):
        with pytest.raises(ValueError, match="filled cells"):
            table(("a", "b"), [row])


def test_the_page_stands_alone(tmp_path):
    page = to_html("# T\n\n| a | b |\n| --- | ---: |\n| <i> | 1 |", "T & U", tmp_path)
    assert '<div class="wide"><table>' in page
    assert "&lt;i&gt;" in page
    assert "<title>T &amp; U</title>" in page
    assert 'name="viewport"' in page
    assert not re.search(r"""(src|href)=["']?(http|//|/)""", page)


@pytest.mark.soak
def test_quick_gives_the_whole_report(tmp_path):
    """As a user runs it: every stage, no cell missing but for what no machine without a GPU can have."""
    process = subprocess.run(
        [sys.executable, "-m", "bench.reproduce", "--quick", "--device", "cpu", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    markdown = (tmp_path / "out/REPORT.md").read_text()
    missing = {line for row in rows_of(markdown) for line in row if "not available" in line}
    assert missing == {"not available: no GPU here", "not available: not one of the lab's models"}
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) == len(set(pictures)) == 12 + 9
    assert all((tmp_path / "out" / name).is_file() for name in pictures)
    assert (tmp_path / "out/REPORT.html").read_text().count("data:image/png;base64,") == len(pictures)
