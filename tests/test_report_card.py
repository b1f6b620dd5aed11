"""The report card: its command, its tables, what it compares with, and estimates by a calibration."""

import dataclasses
import io
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.report_card import calibration, card, command, console, report, targets
from bench.report_card.card import Row, row
from bench.report_card.figure import draw, rooflines
from kernels import tiles
from kernels.geometry import ConvGeometry
from train.cli import UserError

SHAPE = "256,64,32,32,64,3,3,1,1"
G64 = ConvGeometry.of((256, 64, 32, 32), (64, 64, 3, 3), 1, 1)


@pytest.fixture(scope="module")
def forward() -> Row:
    return row("forward", G64, torch.float16, "ieee", "sm_80")


@pytest.fixture
def card_run(run_main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """card_run("simplenet", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: run_main(command.main, *arguments)


def printed(show: Callable[[Console], None], width: int = 120) -> str:
    to = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    show(to)
    return to.export_text()


def as_json(found: Row) -> dict:
    return report.make_report([found], None)


# One row


def test_a_row_is_what_the_compiler_made(forward):
    (M, N, K), warps = forward.tile, forward.warps
    assert (forward.op, forward.dtype, forward.arch, forward.layer) == ("forward", "fp16", "sm_80", "conv3x3-64")
    assert forward.programs == 256 * 32 * 32 // M * (64 // N)
    assert forward.registers <= 255
    assert forward.tensor_core_instructions * 2048 == forward.multiply_adds_a_pass
    assert forward.multiply_adds_a_pass % (M * N * K // warps) == 0 or forward.unrolled
    assert forward.overhead == pytest.approx(1000 * forward.others / forward.multiply_adds_a_pass)
    assert sum(forward.mix.values()) == forward.others + forward.tensor_core_instructions
    assert set(forward.global_loads) == {16}
    assert 0 < forward.roofline_share <= 1
    assert forward.bound_seconds == max(forward.bound_parts.values())


def test_a_weight_gradient_counts_its_second_pass():
    found = row("weight_grad", G64, torch.float16, "ieee", "sm_80")
    (then,) = found.others_launched
    assert then.kernel == "sum_splits_kernel"
    assert found.bound_seconds == pytest.approx(max(found.bound_parts.values()) + then.bound_seconds)


@pytest.mark.parametrize(
    ("op", "main", "copy"),
    [
        ("forward", "forward_kernel", "pad_kernel"),
        ("input_grad", "forward_kernel", "class_filters_kernel"),
        ("weight_grad", "weight_grad_kernel", "pad_kernel"),
    ],
)
def test_a_copy_stands_beside_the_launch_that_multiplies(op, main, copy):
    found = row(op, ConvGeometry.of((8, 3, 32, 32), (64, 3, 7, 7), 2, 3), torch.float16, "ieee", "sm_80")
    first, *rest = found.others_launched
    assert (found.kernel, first.kernel) == (main, copy)
    assert [other.kernel for other in rest] in ([], ["sum_splits_kernel"])
    assert found.tensor_core_instructions > 0
    others = sum(other.bound_seconds for other in found.others_launched)
    assert found.bound_seconds == pytest.approx(max(found.bound_parts.values()) + others)
    assert found.multiply_adds > found.useful_multiply_adds
    assert (found.zero_insertion_multiply_adds is None) == (op != "input_grad")


def test_an_operation_with_a_relu_is_asked_for_by_name_and_its_mask_is_counted(card_run, tmp_path):
    code, out, _ = card_run(
        "--shape", SHAPE, "--op", "input_grad", "input_grad_masked", "--arch", "sm_80", "--json", "card.json",
        "--figure", "roof.png",
    )  # fmt: skip
    assert code == 0
    assert "input_grad_masked" in out
    plain, masked = json.loads((tmp_path / "card.json").read_text())["rows"]
    assert [plain["op"], masked["op"]] == ["input_grad", "input_grad_masked"]
    assert masked["compulsory_bytes"] - plain["compulsory_bytes"] == 256 * 64 * 32 * 32 * 2
    assert masked["useful_multiply_adds"] == plain["useful_multiply_adds"]
    assert masked["overhead"] > plain["overhead"]


def test_rows_of_other_dtypes_and_kinds():
    tf32 = row("forward", ConvGeometry.of((8, 64, 8, 8), (64, 64, 3, 3), 1, 1), torch.float32, "tf32", "sm_90")
    assert (tf32.dtype, tf32.tensor_core_instructions > 0, tf32.others_per_fma) == ("tf32", True, None)
    fp32 = row("forward", G64, torch.float32, "ieee", "sm_75")
    assert (fp32.dtype, fp32.tensor_core_instructions) == ("fp32", 0)
    assert 0 < fp32.others_per_fma < 1
    channelwise = ConvGeometry.of((8, 64, 8, 8), (64, 1, 3, 3), 1, 1, 1, 64)
    depthwise = row("forward", channelwise, torch.float16, "ieee", "sm_80")
    assert depthwise.depthwise
    assert not [words for words in targets.judge(depthwise) if "tensor" in words]
    strided = row("input_grad", ConvGeometry.of((8, 64, 8, 8), (64, 64, 3, 3), 2, 1), torch.float16, "ieee", "sm_80")
    assert strided.zero_insertion_multiply_adds == 4 * strided.multiply_adds


def test_sm_100_takes_its_multiply_adds_from_the_tile():
    found = row("forward", G64, torch.float16, "ieee", "sm_100")
    M, N, K = found.tile
    assert found.from_the_tile
    assert found.multiply_adds_a_pass * found.warps % (M * N * K) == 0


def test_a_tile_put_in_just_now_is_the_one_that_is_compiled(forward, monkeypatch):
    small = tiles.Tile(M=32, N=32, K=32, num_warps=2, num_stages=2)
    monkeypatch.setattr(tiles, "candidates", lambda *_: (small,))
    found = row("forward", G64, torch.float16, "ieee", "sm_80")
    assert (found.tile, found.warps) == ((32, 32, 32), 2)
    assert found.bound_seconds > forward.bound_seconds


def test_a_kernel_that_does_not_fit_has_no_time(monkeypatch):
    """Shared memory of a launch is refused by the driver alone; the compiler makes it."""
    large = tiles.Tile(M=128, N=128, K=64, num_warps=8, num_stages=5)
    monkeypatch.setattr(tiles, "candidates", lambda *_: (large,))
    geometry = ConvGeometry.of((256, 128, 16, 16), (128, 128, 3, 3), 1, 1)
    found = row("forward", geometry, torch.float16, "ieee", "sm_86")
    assert (found.blocks, found.bound_seconds, found.waves, found.roofline_share) == (0, None, None, None)
    assert found.bound_by == "does not fit: shared memory"
    assert "does not fit on a multiprocessor: shared memory" in targets.judge(found)
    text = printed(lambda to: console.print_card(to, [found, found], None))
    assert "never" in text
    assert json.dumps(as_json(found), allow_nan=False)


def test_what_launches_nothing_is_refused():
    with pytest.raises(ValueError, match="launches nothing"):
        row("forward", ConvGeometry.of((0, 8, 8, 8), (8, 8, 3, 3)), torch.float16, "ieee", "sm_80")


# Targets


def test_each_target_is_missed_by_a_row_that_misses_it(forward):
    good = dataclasses.replace(forward, overhead=1.0, spills=0, global_loads={16: 12}, unrolled=False)
    assert targets.judge(good) == []
    wrong = {
        "3 spill instructions, outside the main loop": dict(spills=3),
        "3 spill instructions": dict(spills=3, mix={"spill": 3}),
        "no tensor cores": dict(tensor_core_instructions=0),
        "global loads of 2 bytes": dict(global_loads={16: 8, 2: 4}),
        "global loads of 0 bytes": dict(global_loads={}),
        "no copies in flight": dict(copies_in_flight=0),
        "overhead 1.26 > 1.25": dict(overhead=1.26),
        "100 programs for 108 multiprocessors": dict(op="weight_grad", programs=100),
        "does not fit on a multiprocessor: shared memory": dict(blocks=0, occupancy_limit="shared memory"),
    }
    for words, changes in wrong.items():
        assert targets.judge(dataclasses.replace(good, **changes)) == [words]


def test_a_grid_may_be_small_where_its_reduction_is_too_short_to_split(forward):
    good = dataclasses.replace(forward, op="weight_grad", overhead=1.0, programs=100)
    step = 100 * math.prod(good.tile)
    assert targets.judge(dataclasses.replace(good, multiply_adds=7 * step)) == []
    assert targets.judge(dataclasses.replace(good, multiply_adds=8 * step)) == ["100 programs for 108 multiprocessors"]


def test_only_what_pipelines_is_held_to_its_copies(forward):
    for changes in (dict(stages=2), dict(unrolled=True), dict(arch="sm_75", tensor_core_instructions=0)):
        assert targets.judge(dataclasses.replace(forward, copies_in_flight=None, **changes)) == [], changes
    assert targets.judge(dataclasses.replace(forward, copies_in_flight=None)) == ["no copies in flight"]


def test_rows_without_a_target_are_let_be(forward):
    bad = dataclasses.replace(forward, overhead=99.0, global_loads={16: 1})
    assert targets.target_of(bad).most == 1.25
    for changes in (
        dict(stride=(2, 2)), dict(unrolled=True), dict(arch="sm_86"), dict(dtype="tf32"), dict(groups=2),
        dict(w_shape=(64, 32, 3, 3)),
    ):  # fmt: skip
        assert targets.judge(dataclasses.replace(bad, **changes)) == [], changes
    assert targets.target_of(dataclasses.replace(bad, w_shape=(128, 128, 3, 3))).most == 0.90
    assert targets.target_of(dataclasses.replace(bad, w_shape=(256, 64, 1, 1))).most == 1.25
    three = dataclasses.replace(bad, w_shape=(64, 3, 7, 7), stride=(2, 2), global_loads={2: 12})
    assert targets.judge(three) == []
    tma = dataclasses.replace(bad, overhead=1.0, global_loads={}, tensor_copies=True)
    assert targets.judge(tma) == []


# The command


def test_a_single_row_is_told_in_full_and_written(card_run, tmp_path):
    code, out, err = card_run(
        "--shape", SHAPE, "--op", "forward", "--arch", "sm_80", "--json", "card.json", "--figure", "roof.png"
    )
    assert (code, err) == (0, "")
    for expected in ("forward 3x3 64>64 32", "main loop", "upper bound on speed, uncalibrated", "roofline", "misses"):
        assert expected in out
    told = json.loads((tmp_path / "card.json").read_text())
    (only,) = told["rows"]
    assert (told["label"], only["x_shape"], only["arch"]) == (
        "upper bound on speed, uncalibrated", [256, 64, 32, 32], "sm_80",
    )  # fmt: skip
    assert told["conditions"]["versions"]
    assert (tmp_path / "roof.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_layer_that_reads_its_padding_alone_has_a_row_and_no_speed(card_run):
    code, out, err = card_run("--shape", "1,16,2,2,16,1,1,100,50", "--arch", "sm_80", "--details", "--figure", "a.png")
    assert (code, err, out.count("for 0 useful ones")) == (0, "", 3)


def test_a_table_of_the_command_fits_eighty_columns(card_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = card_run("simplenet", "--layer", "conv3x3-64", "conv3x3-128", "--arch", "sm_80", "--details")
    assert (code, err, out.count("useful ones")) == (0, "", 6)
    assert max(map(len, out.splitlines())) <= 80
    assert "of 6 rows meet their targets" in out
    assert "sm_80" in out.splitlines()[1]


@pytest.mark.parametrize(("width", "has"), [(80, ()), (120, ("occupancy",)), (160, ("occupancy", "MMAs"))])
def test_tables_are_as_wide_as_the_terminal(width, has, forward):
    """With the longest figures that rows have, and nothing cut off."""
    long = dict(
        x_shape=(256, 512, 128, 64), w_shape=(1024, 512, 3, 3), stride=(2, 2), programs=65536, shared_bytes=232448,
        occupancy_limit="shared memory", global_loads={16: 9, 8: 3, 2: 1}, overhead=1234.5, bound_by="shared memory",
    )  # fmt: skip
    rows = [forward, dataclasses.replace(forward, **long), dataclasses.replace(forward, arch="sm_90", op="weight_grad")]
    text = printed(lambda to: console.print_card(to, rows, None), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for expected in ("A100 SXM 80 GB", "H100 SXM", "3x3/2 512>1024 128x64", "16+8+2a", "1234.50", "uncalibrated"):
        assert expected in text
    for heading in ("occupancy", "MMAs"):
        assert (heading in text) == (heading in has)


def test_models_share_their_layers_and_each_geometry_is_compiled_once(monkeypatch):
    arguments = command.make_parser().parse_args([])
    layers = command.layers_of(arguments)
    geometries = [layer.geometry for layer in layers]
    assert len(layers) == len(set(geometries)) == 18
    only = command.layers_of(command.make_parser().parse_args(["simplenet", "--layer", "conv3x3-64"]))
    assert [layer.x_shape for layer in only] == [(256, 64, 32, 32)]
    both = command.layers_of(command.make_parser().parse_args(["simplenet", "--shape", SHAPE]))
    assert len(both) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lenet",), "unknown model 'lenet'; known: simplenet"),
        (("--arch", "sm_42"), "invalid choice: 'sm_42'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--shape", "1,2,3"), "'1,2,3' has 3 numbers instead of 7 to 9"),
        (("--shape", "1,2,x,4,5,6,7"), "'x' is not a whole number"),
        (("--shape", "1,8,4,4,8,7,7"), "Kernel size can't be greater than actual input size"),
        (("--shape", "0,8,4,4,8,3,3"), "0 must be above 0"),
        (("--shape", "1,8,4,4,8,3,3,1,-1"), "-1 must be at least 0"),
        (("--shape", "99999,999,9999,9999,8,3,3"), "beyond any machine"),
        (("--shape", "1,1,1,99999999,1,1,1"), "beyond any machine"),
        (("simplenet", "--layer", "conv5x5-64"), "--layer conv5x5-64: there is none; there are conv7x7-64"),
        (("--arch",), "expected at least one argument"),
        (("simplenet", "--json", "missing/card.json"), "there is no folder missing"),
        (("simplenet", "--figure", "."), "is a folder; name a file"),
        (("simplenet", "--json", "a", "--figure", "a"), "would both be written into a"),
        (("simplenet", "--against", "missing.json"), "missing.json: No such file"),
        (("simplenet", "--calibration", "missing.json"), "missing.json: No such file"),
        (("resnet18", "--image-size", "16"), "image size 16 is too small"),
        (("simplenet", "--batch-size", "999999999999"), "beyond any machine"),
    ],
)
def test_mistakes_are_one_line(card_run, arguments, words):
    code, out, err = card_run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err
    assert err.startswith("bench.report_card: error: ")


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2]", "{", '{"format": "other"}', '{"format": "conv-lab report card 1", "rows": [{}]}', b"\xff\xfe\x00"],
)
def test_what_is_no_report_is_refused_in_one_line(content, card_run, tmp_path):
    (tmp_path / "before.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = card_run("simplenet", "--against", "before.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--against before.json" in err


# Against another run


def test_the_same_run_again_is_the_same(card_run):
    arguments = ("--shape", SHAPE, "--op", "forward", "--arch", "sm_80", "sm_90")
    assert card_run(*arguments, "--json", "before.json")[0] == 0
    code, out, _ = card_run(*arguments, "--against", "before.json")
    assert code == 0
    assert "0 better, 0 worse by the time bound, 0 with other figures alone, 2 the same" in out


def test_changes_are_told_by_the_time_bound_first(forward):
    def changed(**figures) -> Row:
        return dataclasses.replace(forward, **figures)

    before = [changed(op="forward"), changed(op="input_grad"), changed(op="weight_grad"), changed(arch="sm_90")]
    after = [
        changed(op="forward", registers=forward.registers + 1),
        changed(op="input_grad", bound_seconds=forward.bound_seconds * 2, tile=(16, 16, 16)),
        changed(op="weight_grad", bound_seconds=forward.bound_seconds / 3, spills=4),
        changed(arch="sm_120"),
    ]
    compared = report.compare(report.make_report(after, None), report.make_report(before, None), Path("before.json"))
    assert [change.op for change in compared.changes] == ["weight_grad", "input_grad", "forward"]
    assert [round(change.ratio, 2) for change in compared.changes] == [0.33, 2.0, 1.0]
    assert (compared.same, compared.only_here, compared.only_there) == (0, 1, 1)
    text = " ".join(printed(lambda to: console.print_comparison(to, compared), 400).split())
    assert "1 better, 1 worse by the time bound, 1 with other figures alone" in text
    assert f"registers {forward.registers} -> {forward.registers + 1}" in text
    assert "spills 0 -> 4" in text
    assert f"tile {'x'.join(map(str, forward.tile))} -> 16x16x16" in text


# Calibration


def measured(times: float, **changes: object) -> dict:
    """A row as a measurement gives it, `times` slower than its bound."""
    g = changes.pop("geometry", G64)
    dtype, precision = card.DTYPES[changes.get("dtype", "fp16")]
    found = row(changes.get("op", "forward"), g, dtype, precision, "sm_80")
    return {
        "arch": "sm_80", "gpu": "NVIDIA A100", "op": "forward", "dtype": "fp16", "precision": precision,
        "x_shape": list(g.x_shape), "w_shape": list(g.w_shape), "stride": [g.SH, g.SW], "padding": [g.PH, g.PW],
        "dilation": [g.DH, g.DW], "groups": g.groups, "seconds": times * found.bound_seconds,
    } | changes  # fmt: skip


def test_a_calibration_is_the_median_of_measured_over_bound(tmp_path, forward):
    others = [ConvGeometry.of((size, 64, 32, 32), (64, 64, 3, 3), 1, 1) for size in (64, 128)]
    rows = [measured(2.0), measured(1.5, geometry=others[0]), measured(40.0, geometry=others[1])]
    rows.append(measured(3.0, op="input_grad", dtype="tf32") | {"dtype": "torch.float32"})
    calibration.write(tmp_path / "gpu.json", rows)
    told = json.loads((tmp_path / "gpu.json").read_text())
    of_forward = told["factors"]["forward"]["fp16"]
    assert (of_forward["n"], of_forward["factor"]) == (3, pytest.approx(2.0))
    assert (of_forward["least"], of_forward["most"]) == (pytest.approx(1.5), pytest.approx(40.0))
    assert told["factors"]["input_grad"]["tf32"]["factor"] == pytest.approx(3.0)
    assert all(one["bound_seconds"] > 0 for one in told["rows"])
    found = calibration.read(tmp_path / "gpu.json")
    assert found.estimate(forward) == pytest.approx(2 * forward.bound_seconds)
    assert found.estimate(dataclasses.replace(forward, dtype="bf16")) is None
    assert found.estimate(dataclasses.replace(forward, arch="sm_90")) is None
    assert "estimate, calibrated on NVIDIA A100, " in found.label
    assert "n = 3" in found.label


def test_estimates_stand_beside_bounds_and_say_where_they_are_from(card_run, tmp_path):
    calibration.write(tmp_path / "gpu.json", [measured(2.0)])
    arguments = ("--shape", SHAPE, "--arch", "sm_80", "sm_90", "--calibration", "gpu.json")
    code, out, _ = card_run(*arguments, "--json", "card.json")
    assert code == 0
    assert "estimate, calibrated on NVIDIA A100" in out
    told = json.loads((tmp_path / "card.json").read_text())
    by_kind = {(one["arch"], one["op"]): one for one in told["rows"]}
    known = by_kind["sm_80", "forward"]
    assert known["estimate_seconds"] == pytest.approx(2 * known["bound_seconds"])
    assert by_kind["sm_80", "input_grad"]["estimate_seconds"] is by_kind["sm_90", "forward"]["estimate_seconds"] is None
    code, _, err = card_run("--shape", SHAPE, "--arch", "sm_90", "--calibration", "gpu.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "is of NVIDIA A100 (sm_80), and --arch is sm_90" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told.update(format="2"), "is no calibration"),
        (lambda told: told.update(arch="sm_1"), '"arch" is \'sm_1\''),
        (lambda told: told.update(gpu=None), '"gpu" is None'),
        (lambda told: told.pop("date"), '"date" is None'),
        (lambda told: told.update(factors={}), "holds no factor"),
        (lambda told: told["factors"].update(sideways={}), "operations are forward"),
        (lambda told: told["factors"]["forward"].update(int8={}), "'int8' is no dtype"),
        (lambda told: told["factors"]["forward"].update(fp16=3), "is None instead of a number above 0"),
        (lambda told: told["factors"]["forward"]["fp16"].update(factor=-1), "is -1 instead of a number above 0"),
        (lambda told: told["factors"]["forward"]["fp16"].update(factor=float("nan")), "is nan instead"),
        (lambda told: told["factors"]["forward"]["fp16"].update(n=0), "how many layers"),
    ],
)
def test_a_wrong_calibration_is_one_line(change, words, tmp_path):
    told = {
        "format": calibration.FORMAT, "arch": "sm_80", "gpu": "A100", "date": "2026-01-31",
        "factors": {"forward": {"fp16": {"factor": 1.5, "n": 3}}},
    }  # fmt: skip
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(told))
    assert calibration.read(file).factors == {("forward", "fp16"): (1.5, 3)}
    change(told)
    file.write_text(json.dumps(told))
    with pytest.raises(UserError) as caught:
        calibration.read(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_measurements_that_are_none_are_refused(tmp_path):
    for rows, words in (
        ([], "of 0"), ([measured(1.0), measured(1.0, gpu="other")], "of 2"), ([measured(1.0, seconds=0.0)], "took 0.0"),
        ([measured(1.0) | {"dtype": "int8"}], "unknown dtype 'int8'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            calibration.write(tmp_path / "gpu.json", rows)
    assert not (tmp_path / "gpu.json").exists()


def test_the_picture_has_a_panel_a_gpu(forward, tmp_path):
    rows = [forward, dataclasses.replace(forward, arch="sm_90"), dataclasses.replace(forward, bound_seconds=None)]
    found = rooflines(rows)
    assert [axes.get_title() for axes in found.axes] == ["A100 SXM 80 GB (sm_80)", "H100 SXM (sm_90)"]
    assert "uncalibrated" in found.get_suptitle()
    draw(tmp_path / "roof.png", rows)
    width, height = struct.unpack(">II", (tmp_path / "roof.png").read_bytes()[16:24])
    assert width > height > 300
