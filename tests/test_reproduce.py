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
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from bench.reproduce import check, command
from bench.reproduce.accuracy import NAMES
from bench.reproduce.cost import memory
from bench.reproduce.page import table, to_html
from bench.reproduce.plan import CONVOLUTIONS, Scope, Stage, make_plan
from bench.reproduce.report import SECTIONS, make_markdown, write_report
from bench.reproduce.results import Results
from bench.reproduce.robustness import attack, hardening
from bench.reproduce.stages import FOLDER, Outcome, outcome_of, reason_of, run_all
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


def run(stages: list[Stage], out: Path, commit: str = "abc") -> tuple[dict[str, Outcome], list[str]]:
    """Outcomes, and the stages that really ran."""
    ran: list[str] = []
    place = {"device": "CPU", "commit": commit}
    outcomes = run_all(stages, out, place, lambda stage: ran.append(stage.name), lambda *_: None, lambda *_: None)
    return outcomes, ran


def outcome(reason: str | None = None) -> Outcome:
    return Outcome(command="", seconds=1.0, reason=reason, ended="2026-11-26T12:00:00+00:00", device="CPU", commit=None)


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("scope", [QUICK, FULL], ids=["quick", "full"])
def test_every_command_of_the_plan_is_one(scope, tmp_path):
    stages = make_plan(scope)
    for one in stages:
        PARSERS[one.module]().parse_args(one.command(tmp_path)[2:])  # exits where a flag does not exist
    names = [one.name for one in stages]
    assert len(set(names)) == len(names)
    assert {f"{model}-{conv}" for model in models.MODELS for conv in CONVOLUTIONS} < set(names)
    for number, one in enumerate(stages):
        assert {*one.needs, *one.reads} <= set(names[:number])


def test_the_full_plan_follows_the_writeup():
    stages = {one.name: one for one in make_plan(FULL)}

    def value(name: str, flag: str) -> str:
        arguments = stages[name].arguments
        return arguments[arguments.index(flag) + 1]

    for name in ("simplenet-torch", "simplevit-unfold", "resnet18-triton"):
        assert value(name, "--recipe") == "writeup"
        assert not {"--epochs", "--limit-train"} & set(stages[name].arguments)  # the recipe's
        assert value(name, "--image-size") == "128"
    assert "imagenet" in stages["resnet18-torch"].arguments
    assert (value("pretrain", "--epochs"), value("robust", "--epochs")) == ("30", "10")
    assert value("sweep", "--conv") == "triton"
    assert "memory-gpu" in stages
    assert "memory-gpu" not in {one.name for one in make_plan(QUICK)}


def test_every_model_is_reported():
    assert list(NAMES) == list(models.MODELS)


@pytest.mark.parametrize("out", ["t", "runs", ".", "/tmp/my report"])
def test_a_command_is_typed_the_same_wherever_the_report_lies(out):
    stages = {one.name: one for one in make_plan(replace(QUICK, data="/my images"))}
    one = stages["simplenet-torch"]
    assert one.typed.startswith("python -m train.run simplenet --conv torch --data '/my images' --image-size 32")
    assert one.typed.endswith("--out DIR/runs/simplenet-torch")
    assert one.command(Path(out))[-1] == str(Path(out) / "runs/simplenet-torch")
    assert stages["compare"].command(Path(out))[2:] == [str(Path(out) / "runs"), "--out", str(Path(out) / "compare")]


# ---------------------------------------------------------------- running


def test_what_ended_well_is_not_run_again(tmp_path):
    first, second = stage("first", "print('told')"), stage("second", "1 / 0")
    outcomes, ran = run([first, second], tmp_path / "out")
    assert ran == ["first", "second"]
    assert outcomes["first"].reason is None
    assert outcomes["second"].reason == "ZeroDivisionError: division by zero"
    assert "told" in (tmp_path / "out" / FOLDER / "first.txt").read_text()
    (tmp_path / "out").rename(tmp_path / "moved")
    assert run([first, second], tmp_path / "moved")[1] == ["second"]
    assert run([stage("first", "print('other')"), second], tmp_path / "moved")[1] == ["first", "second"]


def test_what_reads_a_result_that_was_made_anew_is_made_anew(tmp_path):
    def stages(command: str) -> list[Stage]:
        return [
            stage("first", command), stage("second", "1", needs=("first",)), stage("third", "1", reads=("first",)),
            stage("fourth", "1", needs=("third",)), stage("fifth", "1"),
        ]  # fmt: skip

    assert run(stages("1"), tmp_path)[1] == ["first", "second", "third", "fourth", "fifth"]
    assert run(stages("1"), tmp_path)[1] == []
    assert run(stages("2"), tmp_path)[1] == ["first", "second", "third", "fourth"]


def test_a_failure_fails_what_needs_it_and_nothing_else(tmp_path):
    stages = [stage("first", "1 / 0"), stage("second", "1", needs=("first",)), stage("third", "1", reads=("first",))]
    outcomes, ran = run(stages, tmp_path)
    assert ran == ["first", "third"]
    assert outcomes["second"].reason == "it needs first, which failed"
    assert outcomes["third"].reason is None


def test_while_one_is_tried_again_the_others_results_stay(tmp_path):
    stages, seen = [stage("first", "1 / 0"), stage("second", "1")], []
    run(stages, tmp_path)
    run_all(
        stages, tmp_path, {"device": "CPU", "commit": None}, lambda *_: None, lambda *_: None,
        lambda outcomes, stage, earlier: seen.append((stage.name, outcomes["second"].reason, earlier)),
    )  # fmt: skip
    assert seen == [("first", None, False), ("second", None, True)]


def test_each_outcome_keeps_where_and_by_which_commit_it_was_made(tmp_path):
    run([stage("first", "1"), stage("second", "1 / 0")], tmp_path, commit="old")
    outcomes, _ = run([stage("first", "1"), stage("second", "1 / 0")], tmp_path, commit="new")
    assert [outcomes[name].commit for name in ("first", "second")] == ["old", "new"]
    markdown = make_markdown(Results(out=tmp_path, scope=QUICK, outcomes=outcomes), [], ABOUT)
    assert "on CPU; " in markdown
    assert "commit old and new" in markdown


def test_a_commands_own_error_is_the_reason(tmp_path):
    broken = Stage(name="run", title="run", module="train.compare", arguments=("nowhere",))
    outcomes, _ = run([broken], tmp_path)
    assert outcomes["run"].reason == "no run folder nowhere"


@pytest.mark.parametrize(
    ("code", "lines", "reason"),
    [
        (0, ["fine"], None),
        (2, ["train.run: error: what is wrong", "  warnings.warn("], "what is wrong"),
        (1, ["Traceback (most recent call last):", "  x", "RuntimeError: CUDA error: y", "Compile with Z"],
         "RuntimeError: CUDA error: y"),
        (1, ["said", "wrong: it"], "wrong: it"),
        (3, [], "exit code 3"),
        (-9, ["x"], "ended by signal 9 (Killed)"),
        (-40, [], "ended by signal 40 (Real-time signal 6)"),
    ],
)  # fmt: skip
def test_the_reason_is_what_tells_most(code, lines, reason):
    assert reason_of(code, lines) == reason


def test_one_that_was_killed_says_so(tmp_path):
    outcomes, _ = run([stage("killed", "import os; os.kill(os.getpid(), 9)")], tmp_path)
    assert outcomes["killed"].reason == "ended by signal 9 (Killed)"


def test_a_full_disk_hangs_nothing(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "loud.txt").symlink_to("/dev/full")
    outcomes, _ = run([stage("loud", "print('x' * 200_000, flush=True)")], tmp_path)
    assert outcomes["loud"].reason is not None


def test_what_a_stage_leaves_running_is_not_waited_for(tmp_path):
    begun = time.monotonic()
    run([stage("left", "import subprocess; subprocess.Popen(['sleep', '20'])")], tmp_path)
    assert time.monotonic() - begun < 15


def test_a_training_that_has_begun_is_gone_on_with(tmp_path):
    one = {one.name: one for one in make_plan(QUICK)}["simplenet-torch"]
    assert "--resume" not in one.command(tmp_path)
    folder = tmp_path / one.run_folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert one.command(tmp_path) == ["-m", "train.run", "--resume", str(folder)]
    with pytest.raises(UserError, match="holds a run of another command"):
        outcome_of(one, tmp_path)  # no stage of ours began it
    (tmp_path / FOLDER).mkdir()
    kept = replace(outcome(), command=one.typed)
    (tmp_path / FOLDER / "simplenet-torch.json").write_text(json.dumps(asdict(kept)))
    assert outcome_of(one, tmp_path) == kept
    shutil.rmtree(folder)
    assert outcome_of(one, tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds": 1}'])
def test_a_damaged_outcome_is_told(tmp_path, text):
    one = stage("first", "1")
    run([one], tmp_path)
    (tmp_path / FOLDER / "first.json").write_text(text)
    with pytest.raises(UserError, match=r"first\.json is damaged"):
        outcome_of(one, tmp_path)


SCRIPT = """
from bench.reproduce import command, plan
plan.QUICK_EPOCHS, plan.QUICK_TRAIN, plan.QUICK_VAL = 3, 200, 20
make = command.make_plan
command.make_plan = lambda scope: [stage for stage in make(scope) if stage.name == "simplenet-torch"]
command.main(["--quick", "--device", "cpu", "--out", "out"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)])
def test_interrupted_it_goes_on_where_it_was(tmp_path, by):
    """The training stops with the command, also where that is killed, and the same command resumes it."""

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    folder = tmp_path / "out/runs/simplenet-torch"
    steps = folder / "steps.csv"
    first = start()
    while not (steps.exists() and steps.read_text().count("\n") > 2):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(by)
    _, errors = first.communicate(timeout=120)
    if by != signal.SIGKILL:
        assert first.returncode == 2
        assert errors == "bench.reproduce: error: interrupted; the same command goes on in out\n"
    else:
        told = tmp_path / "out" / FOLDER / "simplenet-torch.txt"
        deadline = time.monotonic() + 60
        while "stopped after step" not in told.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)  # until it has let go of its folder
    done = steps.read_text()
    assert (folder / "last.pt").exists()

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
    class Wrong(nn.Conv2d):
        def _conv_forward(self, x, *operands):
            return super()._conv_forward(x * 0.5 + x.detach() * 0.5, *operands)

    monkeypatch.setitem(models.CONVOLUTIONS, "unfold", Wrong)
    monkeypatch.setattr(check, "X_SHAPE", (1, 3, 8, 8))
    monkeypatch.setattr(check, "CHANNELS", 2)
    report = check.check(torch.device("cpu"))
    *told, last = check.wrongs(report)
    assert len(told) == len(check.CASES)
    assert all("unfold" in line and "input gradient" in line for line in told)
    assert last == "unfold: gradcheck failed"
    assert "Jacobian mismatch" in report["gradcheck"]["unfold"]["failed"]
    assert report["gradcheck"]["triton"]["failed"] is None


# ---------------------------------------------------------------- the report


def results(out: Path, scope: Scope = QUICK, outcomes: dict | None = None) -> tuple[Results, list[Stage]]:
    stages = make_plan(scope)
    failed = {one.name: outcome("the disk is full") for one in stages}
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
    fine = outcome()
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


def test_a_training_without_a_summary_is_not_finished(tmp_path, trained_folder):
    folder = tmp_path / "runs/customnet-unfold"
    shutil.copytree(trained_folder, folder)
    (folder / "summary.json").unlink()
    markdown = make_markdown(*results(tmp_path, outcomes={"customnet-unfold": outcome()}), ABOUT)
    row = next(row for row in rows_of(markdown) if row[:2] == ["CustomNet", "not available: it is not finished"])
    assert row[2] == "not available: it is not finished"


CONDITIONS = {
    "model": "simplenet", "checkpoint": "runs/x/last.pt", "epoch": 3, "images": 200, "image_size": 32, "classes": 10,
    "conv": "torch", "backend": "native", "device": "CPU", "precision": "float32",
}  # fmt: skip
CHECKS = {"checks": [{"name": "kernel check", "found": "1 / 2", "verdict": "doubt", "words": "they differ"}]}


def test_cells_of_the_attacks_are_their_own(tmp_path):
    """Each of the twelve has figures of its own: top-1 n, top-5 n + 50."""
    rows = [
        {"num_steps": s, "step_size": z, "epsilon": e, "target": target, "top1": number, "top5": number + 50}
        for number, ((s, z, e), target) in enumerate(product(writeup.UNDER_ATTACK, ("least_likely", "most_likely")))
    ]  # fmt: skip
    report = CONDITIONS | {"clean": {"top1": 70, "top5": 99}, "rows": rows[:-1], "doubts": ["x"], "checks": CHECKS}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(report))
    found, _ = results(tmp_path, outcomes={"sweep": outcome()})
    text = "\n\n".join(attack(found))
    table = {row[0]: row[1:] for row in rows_of(text)}
    assert table["10 / 0.01 / 0.1"] == ["0.00 / 50.00", "11.21 / 34.15", "1.00 / 51.00", "9.00 / 35.70"]
    assert table["10 / 0.1 / 10"] == ["8.00 / 58.00", "1.84 / 8.93", "9.00 / 59.00", "1.59 / 7.08"]
    assert table["50 / 0.1 / 10"][2] == "not available: sweep.json lacks it"
    assert table["kernel check"] == ["1 / 2", "doubt: they differ"]
    assert "least likely 0.00 / 50.00 and 6.00 / 56.00; most likely 1.00 / 51.00 and 7.00 / 57.00" in text
    assert "epoch 3 (last.pt) on 200 validation images" in text


def test_cells_of_the_copies_are_their_own(tmp_path):
    def copy(first: int) -> dict:
        under = ("clean", "least_likely", "most_likely")
        return {name: {"top1": first + i, "top5": first + i + 20} for i, name in enumerate(under)} | {"checks": CHECKS}

    report = {
        "attack": {"num_steps": 10, "step_size": 0.01, "epsilon": 0.1},
        "training": {"epochs": 4, "target": "least_likely", "num_steps": 5, "step_size": 0.01, "epsilon": 0.1},
        "pretrained": CONDITIONS, "copies": {"plain": copy(10), "adversarial": copy(40)},
    }  # fmt: skip
    (tmp_path / "robust").mkdir()
    (tmp_path / "robust/robust.json").write_text(json.dumps(report))
    found, _ = results(tmp_path, outcomes={"robust": outcome()})
    rows = rows_of("\n\n".join(hardening(found)))
    assert rows[2:4] == [
        ["SimpleNet", "10.00 / 30.00", "33.61 / 63.51", "11.00 / 31.00", "12.00 / 32.00", "14.51 / 38.19"],
        ["adversarially trained SimpleNet", "40.00 / 60.00", "29.32 / 58.55", "41.00 / 61.00", "42.00 / 62.00",
         "23.60 / 52.33"],
    ]  # fmt: skip
    assert [row[0] for row in rows].count("kernel check") == 2


def test_cells_of_memory_are_their_own(tmp_path):
    mib = 2**20

    def entry(number: int) -> dict:
        return {"peak": number * mib, "process": [(100 + number) * mib, (200 + number) * mib], "gap_to_writeup": None}

    reports = [
        {"model": model, "differences": [],
         "convolutions": {conv: entry(10 * i + j) for j, conv in enumerate(CONVOLUTIONS)}}
        for i, model in enumerate(models.MODELS)
    ]  # fmt: skip
    (tmp_path / "memory.json").write_text(json.dumps({"reports": reports}))
    found, _ = results(tmp_path, outcomes={"memory": outcome()})
    rows = {(row[0], row[1]): row[2:6] for row in rows_of("\n\n".join(memory(found)))}
    no_gpu = "not available: no GPU here"
    assert rows["SimpleNet", "unfold"] == ["1", "101–201", no_gpu, "4,881"]
    assert rows["ResNet18", "triton"] == ["32", "132–232", no_gpu, "no such run"]


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"rows": [{}]}'])
def test_a_damaged_result_is_told_in_its_section(tmp_path, text):
    (tmp_path / "check.json").write_text(text)
    markdown = make_markdown(*results(tmp_path, outcomes={"check": outcome()}), ABOUT)
    assert "not available: a file that it is made of is damaged" in markdown
    assert "## 2. Models" in markdown


def test_a_picture_that_is_gone_is_said_to_be(tmp_path):
    found, _ = results(tmp_path, outcomes={"compare": outcome()})
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


@pytest.mark.long
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
