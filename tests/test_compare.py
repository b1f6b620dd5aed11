"""The comparing command: what it makes of run folders, and one line for each mistake."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from train import compare, memory, writeup
from train.files import write_csv
from train.recipes import RECIPES
from train.records import EPOCH_COLUMNS
from train.runs import crossing_epoch, group_runs, read_run

VAL = (30.0, 40.0, 44.0)
TRAIN = (20.0, 39.0, 46.0)
GPU, CPU = "peak of PyTorch's allocated GPU memory", "peak resident set of the process (CPU)"


@pytest.fixture
def make_run(tmp_path):
    """make_run("a", seed=1, val=...) writes the files of a run that compare reads."""

    def make(
        name: str, *, val=VAL, train=TRAIN, classes=100, memory=(GPU, 3000.0), processor="NVIDIA T4", speed=500.0,
        finished=True, **settings: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        defaults = dict(
            model="simplenet", conv="torch", data="/data/miniplaces", image_size=128, device="cuda", epochs=len(val)
        )
        config = dataclasses.replace(RECIPES["writeup"], **(defaults | settings))
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        rows = [
            dict.fromkeys(EPOCH_COLUMNS, 1.0)
            | {"epoch": i, "train_top1": t, "val_top1": v, "val_top5": v + 20, "images_per_s": speed}
            for i, (t, v) in enumerate(zip(train, val, strict=True), start=1)
        ]
        write_csv(folder / "metrics.csv", EPOCH_COLUMNS, rows)
        if finished:
            backend = {"cpu": "interpreter", "cuda": "compiled"}[config.device] if config.conv == "triton" else "native"
            summary = dict(
                backend=backend, device=processor, classes=classes, images_per_s=speed,
                memory=dict(zip(("kind", "mib"), memory, strict=True)),
            )
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


@pytest.fixture
def compare_run(run_main, monkeypatch):
    """compare_run("a", "b") -> (exit code, stdout, stderr, rows of compare.csv), run in this process in tmp_path."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str, list[dict[str, str]]]:
        told = run_main(compare.main, *arguments)
        rows = []
        if Path("compare.csv").exists():
            with open("compare.csv", newline="") as file:
                rows = list(csv.DictReader(file))
        return *told, rows

    return run


def line_of(out: str, start: str) -> list[str]:
    """The words of the first line that begins so, without the beginning."""
    return next(line for line in out.splitlines() if line.startswith(start)).removeprefix(start).split()


def test_one_run_is_read_right(make_run, compare_run):
    make_run("a")
    code, out, err, (row,) = compare_run("a")
    assert (code, err) == (0, "")
    assert line_of(out, "simplenet torch writeup") == ["3", "1", "44.00", "64.00", "44.00", "3", "+2.0"]
    assert (float(row["val_top1"]), float(row["val_top5"]), float(row["gap"])) == (44, 64, 2)
    assert (row["crossing_epoch"], row["n"], row["val_top1_sd"]) == ("3", "1", "")
    with Image.open("compare.png") as image:
        assert image.width > 500


@pytest.mark.parametrize(
    ("train", "val", "epoch"),
    [
        pytest.param([1, 3, 5], [2, 3, 4], 3, id="equal-is-not-above"),
        pytest.param([3, 1, 5], [2, 3, 4], 1, id="the-first-of-two"),
        pytest.param([1, 2, 3], [2, 3, 4], None, id="never"),
    ],
)
def test_crossing_epoch(train, val, epoch):
    assert crossing_epoch(train, val) == epoch


def test_best_is_not_the_last(make_run, compare_run):
    make_run("a", val=(30.0, 44.0, 43.0))
    row = compare_run("a")[3][0]
    assert (float(row["val_top1"]), float(row["best_val_top1"])) == (43, 44)


def test_seeds_become_one_row_with_mean_and_deviation(make_run, compare_run):
    make_run("runs/a", seed=0, val=(30.0, 40.0, 43.0))
    make_run("runs/b", seed=1, val=(30.0, 40.0, 45.0), train=(31.0, 39.0, 44.0))
    make_run("runs/c", seed=2, lr=0.2)
    _, out, _, rows = compare_run("runs")
    assert [row["n"] for row in rows] == ["2", "1"]
    assert (float(rows[0]["val_top1"]), float(rows[0]["val_top1_sd"])) == (44, pytest.approx(2**0.5, rel=1e-5))
    assert rows[0]["crossing_epoch"] == "3 1"
    assert line_of(out, "simplenet torch writeup")[1:3] == ["2", "44.00"]
    assert "1..3" in out
    assert "±1.41" in out
    assert "standard deviation" in out
    assert [row["settings"] for row in rows] == ["lr=0.1", "lr=0.2"]


def test_a_seed_twice_is_said(make_run, compare_run):
    make_run("a")
    make_run("b")
    assert "the same seed more than once: a, b" in compare_run("a", "b")[1]
    assert "the same seed" not in compare_run("a", "a")[1]


def test_an_unfinished_run_is_said_to_be_one_and_stays_out_of_a_mean(make_run, compare_run):
    make_run("a")
    make_run("b", seed=1, finished=False, epochs=60)
    make_run("c", seed=2, val=(), train=(), finished=False, epochs=60)
    code, out, _, rows = compare_run("a", "b", "c")
    assert code == 0
    assert [(row["finished"], row["n"], row["epochs"]) for row in rows] == [("True", "1", "3"), ("False", "1", "3")]
    assert "3/60" in out
    assert "unfinished" in out
    assert "left out: c has not finished an epoch" in out


def test_memory_of_different_kinds_has_columns_of_its_own(make_run, compare_run):
    make_run("a", memory=(GPU, 3001.0))
    make_run("b", memory=(CPU, 702.0), processor="CPU (x)", device="cpu", conv="triton")
    _, out, _, rows = compare_run("a", "b")
    assert [row["memory_kind"] for row in rows] == [GPU, CPU]
    text = " ".join(out.split())
    assert f"(a) {GPU} (b) {CPU}" in text
    cost = out.split("where, how fast")[1]
    places = [next(line for line in cost.splitlines() if figure in line).index(figure) for figure in ("3,001", "702")]
    assert places[1] > places[0] + 5


def test_memory_of_different_kinds_does_not_mix_in_one_row(make_run, compare_run):
    """Seeds of one group: the first by an earlier version, two since."""
    make_run("a", seed=0, memory=(GPU, 1523.0))
    make_run("b", seed=1, memory=(memory.PROCESS, 3001.0))
    make_run("c", seed=2, memory=(memory.PROCESS, 3003.0))
    _, out, _, (row,) = compare_run("a", "b", "c")
    assert (row["n"], row["memory_kind"], row["memory_mib"], row["memory_mib_sd"]) == ("3", GPU, "1523", "")
    assert line_of(out.split("where, how fast")[1], "simplenet torch writeup")[-2:] == ["1,523", "3,002"]
    assert "memory of different kinds in one row" in out
    assert f"(b) {memory.PROCESS}" in out


def test_the_mean_of_a_run_stands_beside_the_writeups_in_a_column_of_its_own(make_run, compare_run):
    make_run("a", memory=(memory.PROCESS, 3001.0))
    out = compare_run("a")[1]
    ours, theirs = (
        next(line for line in out.split("where, how fast")[1].splitlines() if figure in line)
        for figure in ("3,001", f"{writeup.SIMPLENET.mib:,}")
    )
    assert ours.index("3,001") < theirs.index(f"{writeup.SIMPLENET.mib:,}")
    assert f"(a) {memory.PROCESS}\n(b) {writeup.MEMORY_KIND}" in out


def test_memory_that_a_run_does_not_know_is_left_open(make_run, compare_run):
    make_run("a", memory=(memory.PROCESS, None))
    code, out, _, (row,) = compare_run("a")
    assert (code, row["memory_mib"], row["memory_kind"]) == (0, "", memory.PROCESS)
    assert line_of(out.split("where, how fast")[1], "simplenet torch writeup") == ["native", "500.0", "-"]


def test_tables_of_epochs_with_empty_cells_and_of_earlier_versions_are_read(make_run, compare_run):
    for name, columns in (("a", EPOCH_COLUMNS), ("b", EPOCH_COLUMNS[: -len(memory.COLUMNS)])):
        path = make_run(name, seed=ord(name)) / "metrics.csv"
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        kept = [{name: row[name] for name in columns} for row in rows]
        write_csv(path, columns, [row | dict.fromkeys(set(columns) & set(memory.COLUMNS), "") for row in kept])
    code, _, err, (row,) = compare_run("a", "b")
    assert (code, err, row["n"], float(row["val_top1"])) == (0, "", "2", 44)


def test_where_the_kernels_ran_is_shown(make_run, compare_run):
    make_run("a", conv="triton", processor="NVIDIA H100")
    make_run("b", conv="unfold", processor="NVIDIA H100")
    make_run("c", conv="triton", device="cpu", finished=False)
    _, out, _, rows = compare_run("a", "b", "c")
    assert [row["backend"] for row in rows] == ["compiled", "native", "interpreter"]
    assert "compiled on NVIDIA H100" in out


@pytest.mark.parametrize(
    ("settings", "figures"),
    [
        (dict(conv="torch"), writeup.SIMPLENET),
        (dict(conv="triton"), writeup.SIMPLENET),
        (dict(conv="unfold"), writeup.SIMPLENET_UNFOLD),
        (dict(model="customnet"), writeup.CUSTOMNET),
        (dict(model="simplevit"), writeup.SIMPLEVIT),
        (dict(model="resnet18", weights="imagenet"), writeup.RESNET18_FINE_TUNED),
        (dict(model="resnet18"), None),
        (dict(image_size=64), None),
        (dict(classes=10), None),
        (dict(data="/data/flowers"), None),
        (dict(limit_val=1000), None),
        (dict(finished=False), None),
    ],
    ids=lambda value: "-".join(f"{v}" for v in value.values()) if isinstance(value, dict) else "",
)
def test_the_writeups_figures_stand_beside_runs_on_its_data_alone(settings, figures, make_run, compare_run):
    make_run("a", **settings)
    _, out, _, (row,) = compare_run("a")
    if figures is None:
        assert row["writeup_top1"] == ""
        assert "The write-up's figures are not shown" in out
    else:
        assert (float(row["writeup_top1"]), int(row["writeup_mib"])) == (figures.top1, figures.mib)
        expected = [str(figures.epochs), "1", f"{figures.top1:.2f}", f"{figures.top5:.2f}"]
        assert line_of(out, f"  write-up, {figures.conv}") == expected
        assert f"{figures.mib:,}" in out


@pytest.mark.parametrize("other", [dict(data="/data/flowers"), dict(image_size=64), dict(limit_val=100)])
def test_different_images_are_warned_of(other, make_run, compare_run):
    make_run("a")
    make_run("b", conv="triton")
    make_run("c", conv="triton", **other)
    assert "warning" not in compare_run("a", "b")[1]
    _, out, _, rows = compare_run("a", "b", "c")
    assert "warning: these runs were validated on different images" in out
    assert len({row["settings"] for row in rows}) == 2


def test_a_setting_that_is_off_is_left_out(make_run, compare_run):
    make_run("a", clip=None)
    make_run("b", clip=1.0)
    assert [row["settings"] for row in compare_run("a", "b")[3]] == ["", "clip=1.0"]


@pytest.mark.parametrize(
    ("first", "second", "devices"),
    [
        pytest.param(dict(), dict(finished=False), ["", ""], id="not-yet-told"),
        pytest.param(
            dict(), dict(processor="NVIDIA H100"), ["device=NVIDIA T4", "device=NVIDIA H100"], id="two-names"
        ),
        pytest.param(
            dict(), dict(finished=False, device="cpu"), ["device=NVIDIA T4", "device=cpu"], id="two-kinds"
        ),
    ],
)
def test_the_device_tells_apart_those_who_have_told_it(first, second, devices, make_run, compare_run):
    make_run("a", lr=0.1, **first)
    make_run("b", lr=0.2, **second)
    rows = compare_run("a", "b")[3]
    assert [[part for part in row["settings"].split(", ") if "device" in part] for row in rows] == [
        [device] if device else [] for device in devices
    ]


# ---------------------------------------------------------------- the figure


@pytest.mark.parametrize(
    ("label", "lines"),
    [
        pytest.param("a net, x=1, y=2", ["a net, x=1,", "y=2"], id="after-commas"),
        pytest.param("a net, x=1 2 3 4", ["a net,", "x=1 2 3 4"], id="not-within-a-setting"),
        pytest.param("a net, x-1=2345678901234", ["a net, x-1=2", "345678901234"], id="unless-it-is-too-long"),
        pytest.param("a net, x=1", ["a net, x=1"], id="short"),
    ],
)
def test_labels_are_wrapped(label, lines):
    assert compare.wrap(label, 12).split("\n") == lines


@pytest.mark.parametrize("count", [1, 8, 20])
@pytest.mark.parametrize(
    "label",
    [
        pytest.param("simplenet torch modern", id="short"),
        pytest.param(
            f"simplenet torch modern, data={'x' * 255}, weight_decay=0.0001, label_smoothing=0.1 (n=3), unfinished",
            id="long",
        ),
    ],
)
def test_the_legend_lies_below_the_axes_and_leaves_them_their_size(count, label, make_run):
    groups = group_runs(read_run(make_run(f"{i}", lr=0.01 * (i + 1))) for i in range(count))
    figure = compare.draw(groups, [label] * count)
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    below, plot, title = (artist.get_tightbbox() for artist in (legend, axes, figure._suptitle))
    assert 0 <= below.y0 < below.y1 <= plot.y0 < plot.y1 <= title.y0 < title.y1 <= figure.bbox.y1
    assert min(below.x0, title.x0) >= 0
    assert max(below.x1, title.x1) <= figure.bbox.x1
    assert axes.bbox.width > 0.8 * figure.bbox.width
    assert axes.bbox.height > 4 * figure.dpi


def test_a_data_folder_of_a_long_name_fits_the_title(make_run):
    groups = group_runs([read_run(make_run("a", data=f"/data/{'x' * 255}"))])
    figure = compare.draw(groups, ["a"])
    figure.draw_without_rendering()
    title = figure._suptitle.get_tightbbox()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.x1


def test_tables_fit_80_columns(make_run, compare_run):
    make_run("a", model="customnet", conv="unfold", val=(1.0, 100.0), train=(1.0, 100.0), seed=0, speed=123456.7)
    make_run("b", model="customnet", conv="unfold", val=(1.0, 50.0), train=(2.0, 50.0), seed=1, speed=123456.7)
    make_run("c", model="resnet18", weights="imagenet", memory=(CPU, 12345.0))
    make_run("d", model="resnet18", memory=(CPU, 12345.0), finished=False, epochs=90)
    out = compare_run("a", "b", "c", "d")[1]
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "123,456.7" in out


def test_runs_are_found_at_any_depth_once_and_other_folders_are_not(make_run, compare_run, tmp_path):
    make_run("runs/deep/a")
    make_run("runs/b", seed=1)
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/config.json").write_text("{}")
    code, _, _, (row,) = compare_run("runs", "runs/b")
    assert code == 0
    assert row["folders"] == "runs/b runs/deep/a"


def test_out_is_made(make_run, compare_run, tmp_path):
    make_run("a")
    assert compare_run("a", "--out", "new/folder")[0] == 0
    assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {"compare.png", "compare.csv"}


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def edit(name: str, old: str, new: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda folder: (folder / "metrics.csv").unlink(), ["a", "metrics.csv"], id="no-metrics"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), ["a", "config.json"], id="no-config"),
        pytest.param(write("config.json", "{"), ["a/config.json", "damaged"], id="config-cut"),
        pytest.param(write("config.json", "[]"), ["a/config.json", "damaged"], id="config-a-list"),
        pytest.param(edit("config.json", '"seed"', '"sed"'), ["a/config.json", "seed"], id="config-without-seed"),
        pytest.param(write("summary.json", "{}"), ["a/summary.json", "backend"], id="summary-empty"),
        pytest.param(edit("summary.json", '"mib"', '"mb"'), ["a/summary.json", "mib"], id="summary-memory"),
        pytest.param(edit("metrics.csv", "val_top5", "five"), ["a/metrics.csv", "val_top5"], id="no-column"),
        pytest.param(edit("metrics.csv", "44.0", "4x"), ["a/metrics.csv", "row 3"], id="no-number"),
        pytest.param(edit("metrics.csv", "44.0", "nan"), ["a/metrics.csv", "row 3"], id="nan"),
        pytest.param(lambda folder: (folder / "metrics.csv").write_bytes(b"\xff\xfe"), ["a/metrics.csv"], id="binary"),
        pytest.param(edit("metrics.csv", "\n2,", "\n7,"), ["a/metrics.csv", "epoch 7"], id="epoch-missing"),
        pytest.param(write("metrics.csv", ",".join(EPOCH_COLUMNS)), ["a", "epoch"], id="no-epoch"),
    ],
)
def test_a_damaged_run_is_one_line(spoil, words, make_run, compare_run, tmp_path):
    spoil(make_run("a"))
    code, out, err, _ = compare_run("a")
    assert (code, out) == (2, "")
    assert err.startswith("train.compare: error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere"], "nowhere"),
        (["."], "no run"),
        ([], "RUN"),
        (["~nobody-of-that-name/a"], "~nobody-of-that-name/a"),
        ([".", "--out", "~nobody-of-that-name/a"], "--out: ~nobody-of-that-name/a"),
    ],
)
def test_no_runs_is_one_line(arguments, word, compare_run):
    code, out, err, _ = compare_run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert word in err


def test_no_name_of_a_file_steers_the_terminal(make_run, compare_run):
    """Names of files may hold anything, and a run folder may come from anyone."""
    make_run("a", data="/data/\x1b[31mred")
    make_run("b", start_from="/\u202eb.pt", weights="/\x07.pth", cache="/\x1b[2J", seed=1)
    make_run("c/\x1b[31mc")
    make_run("c/\x1b[31md")
    make_run("d/\x1b[2J", val=(), train=(), finished=False, epochs=3)
    code, out, err, rows = compare_run("a", "b", "c", "d")
    assert (code, err) == (0, "")
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert all(shown in out for shown in (r"data=\x1b[31mred", r"start_from=\u202eb.pt", r"weights=\x07.pth"))
    assert r"note: the same seed more than once: c/\x1b[31mc, c/\x1b[31md" in out
    assert r"left out: d/\x1b[2J has not" in out
    assert rows[0]["data"] == "/data/\x1b[31mred"


def test_a_run_from_before_a_setting_is_grouped_with_those_after(make_run, compare_run):
    old = make_run("a") / "config.json"
    make_run("b", seed=1)
    make_run("c", seed=2, adversarial="untargeted")
    settings = {name: value for name, value in json.loads(old.read_text()).items() if "adversarial" not in name}
    old.write_text(json.dumps(settings))
    code, _, _, rows = compare_run("a", "b", "c")
    assert code == 0
    assert sorted((row["n"], row["settings"]) for row in rows) == [("1", "adversarial=untargeted"), ("2", "")]
