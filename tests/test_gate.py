"""The gate: what the compiler makes of the kernels meets its targets (bench/report_card/targets.py).

Compilation is deterministic, so this needs no GPU and no tolerance. A named sample is judged here; all layers of
SimpleNet, CustomNet and ResNet18, and the tiles that tuning tries, are in `make test-slow`, most of them for T4, A100
and H100 alone and for the other generations in `pytest -m long`.
"""

import functools

import pytest

from bench.report_card.card import DTYPES, FUSED, OPERATIONS, Row, row
from bench.report_card.targets import TARGETS, judge, target_of
from bench.shapes import conv_layers
from kernels import few_channels, tiles
from kernels.geometry import ConvGeometry
from kernels.runtime import MULTIPROCESSORS, Target

MASKED = tuple(op for op in FUSED if op.endswith("_masked"))

GEOMETRIES = {
    "3x3-64": ConvGeometry.of((256, 64, 32, 32), (64, 64, 3, 3), 1, 1),
    "3x3-128": ConvGeometry.of((256, 128, 16, 16), (128, 128, 3, 3), 1, 1),
    "1x1-64-256": ConvGeometry.of((256, 64, 32, 32), (256, 64, 1, 1)),
    "1x1-256-128": ConvGeometry.of((256, 256, 16, 16), (128, 256, 1, 1)),
    "3x3s2-64-128": ConvGeometry.of((256, 64, 32, 32), (128, 64, 3, 3), 2, 1),
    "7x7s2-3-64": ConvGeometry.of((256, 3, 128, 128), (64, 3, 7, 7), 2, 3),
}

# (geometry, arch, dtype, operations): each generation's own instructions (FFMA, HMMA, HGMMA, and Blackwell's), the
# kinds of layer, and the dtypes whose code differs.
SAMPLE = [
    (name, arch, dtype, op)
    for name, arch, dtype, ops in (
        ("3x3-64", "sm_80", "fp16", OPERATIONS), ("3x3-128", "sm_80", "fp16", OPERATIONS),
        ("1x1-64-256", "sm_80", "fp16", OPERATIONS), ("1x1-256-128", "sm_80", "fp16", ("forward",)),
        ("3x3s2-64-128", "sm_80", "fp16", ("forward", "input_grad")), ("7x7s2-3-64", "sm_80", "fp16", ("forward",)),
        ("3x3-64", "sm_90", "fp16", OPERATIONS), ("3x3-128", "sm_90", "fp16", OPERATIONS),
        ("1x1-64-256", "sm_90", "fp16", OPERATIONS),
        ("3x3-64", "sm_75", "fp32", OPERATIONS), ("3x3-128", "sm_75", "fp32", OPERATIONS),
        ("3x3-64", "sm_120", "fp16", OPERATIONS), ("3x3-64", "sm_100", "fp16", OPERATIONS),
        ("3x3-64", "sm_80", "tf32", ("forward",)), ("3x3-64", "sm_80", "bf16", ("forward",)),
    )
    for op in ops
]  # fmt: skip
# With a ReLU: what a mask may cost is registers, the stages of a pipeline, and the width of loads.
FUSED_SAMPLE = [
    ("3x3-64", "sm_80", "fp16", "forward_relu"),
    *(("3x3-64", arch, dtype, op) for op in MASKED for arch, dtype in (
        ("sm_80", "fp16"), ("sm_90", "fp16"), ("sm_75", "fp32"), ("sm_80", "tf32"),
    )),
]  # fmt: skip


@functools.cache
def sampled(name: str, arch: str, dtype: str, op: str) -> Row:
    return row(op, GEOMETRIES[name], *DTYPES[dtype], arch)


@pytest.mark.parametrize(("name", "arch", "dtype", "op"), SAMPLE)
def test_a_row_of_the_sample_meets_its_targets(name, arch, dtype, op):
    assert not judge(sampled(name, arch, dtype, op))


@pytest.mark.parametrize(("name", "arch", "dtype", "op"), FUSED_SAMPLE)
def test_a_row_with_a_relu_of_the_sample_meets_its_targets(name, arch, dtype, op):
    found = sampled(name, arch, dtype, op)
    assert not judge(found)
    assert (target_of(found) is None) == (op in MASKED)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(("name", "arch"), [("3x3-64", "sm_80"), ("3x3-128", "sm_90")])
def test_the_sample_has_loops_to_judge(name, arch, op):
    """An unrolled loop has no overhead that could be held against it."""
    assert target_of(sampled(name, arch, "fp16", op)) is not None


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("arch", list(MULTIPROCESSORS))
def test_every_target_is_for_something_that_is_sampled_in_the_whole(arch, op):
    """Each GPU's rows are judged by what holds everywhere; overheads are sm_75's, sm_80's and sm_90's alone."""
    found = [target for target in TARGETS if op in target.ops and arch == target.arch]
    assert len(found) == {"sm_75": 1, "sm_80": 2, "sm_90": 2}.get(arch, 0)


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        (tiles.Tile(M=32, N=16, K=16, num_warps=4, num_stages=2), "overhead"),
        (tiles.Tile(M=256, N=128, K=64, num_warps=4, num_stages=2), "spill"),
        (tiles.Tile(M=256, N=64, K=128, num_warps=8, num_stages=5), "does not fit"),
    ],
    ids=["tiny", "too-large-for-registers", "too-large-for-shared-memory"],
)
def test_a_worse_tile_fails_the_gate(worse, missed, monkeypatch):
    monkeypatch.setattr(tiles, "candidates", lambda *_: (worse,))
    misses = judge(row("forward", GEOMETRIES["3x3-128"], *DTYPES["fp16"], "sm_80"))
    assert [words for words in misses if missed in words], misses


# bf16 is compiled as fp16 is, but for the opcode's modifier: one generation of it. sm_89 has the tiles, the shared
# memory and the instructions of sm_86. The rest is whole.
WHOLE = [
    (arch, dtype)
    for arch in MULTIPROCESSORS
    if arch != "sm_89"
    for dtype in ("fp16", "tf32", "fp32", *(("bf16",) if arch == "sm_90" else ()))
    if (arch, dtype) != ("sm_75", "tf32")  # no TF32 there: it is fp32
]


MAIN = ("sm_75", "sm_80", "sm_90")
"""T4, A100, H100."""


def later(kinds):
    """Kinds of kernel that only the main generations' are judged of in `make test-slow`, the others' by hand."""
    return [pytest.param(*kind, marks=pytest.mark.slow if kind[0] in MAIN else pytest.mark.long) for kind in kinds]


def assert_all_meet(op, layers, dtype, arch) -> list[Row]:
    rows = [row(op, layer, *DTYPES[dtype], arch) for layer in layers]
    missed = {f"{each.layer} of {each.x_shape}": misses for each in rows if (misses := judge(each))}
    assert not missed, "\n".join([f"{len(missed)} of {len(rows)} rows:", *(f"  {k}: {v}" for k, v in missed.items())])
    return rows


@functools.cache
def layers_of(*models: str) -> dict:
    return {layer.geometry: layer for model in models for layer in conv_layers(model, 256, 128)}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(("arch", "dtype"), WHOLE)
def test_every_layer_of_simplenet_meets_its_targets(arch, dtype, op):
    rows = assert_all_meet(op, layers_of("simplenet").values(), dtype, arch)
    assert len(rows) == 7
    if op == "weight_grad":
        assert min(found.programs for found in rows) >= MULTIPROCESSORS[arch]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(("arch", "dtype"), later(WHOLE))
def test_every_other_layer_of_every_model_meets_its_targets(arch, dtype, op):
    layers = layers_of("simplenet", "customnet", "resnet18").items() - layers_of("simplenet").items()
    assert len(assert_all_meet(op, dict(layers).values(), dtype, arch)) == 11


@pytest.mark.parametrize("op", MASKED)
@pytest.mark.parametrize(
    ("arch", "dtype"), later(kind for kind in WHOLE if kind[0] in ("sm_90", "sm_120") and kind[1] != "bf16")
)
def test_every_layer_with_a_relu_meets_its_targets_beside_a_mask(arch, dtype, op):
    """CustomNet's layers, SimpleNet's among them; ResNet18's stand before batch norms, which no mask crosses."""
    layers = conv_layers("customnet", 256, 128)
    missed = {layer.name: misses for layer in layers if (misses := judge(row(op, layer, *DTYPES[dtype], arch)))}
    assert not missed, missed


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(
    ("arch", "dtype"), later(kind for kind in WHOLE if kind[0] in (*MAIN, "sm_120") and kind[1] != "bf16")
)
def test_tiles_that_only_tuning_tries_are_sound(arch, dtype, op, monkeypatch):
    """Of SimpleNet's layers, all candidates but the first, which the whole judges: they may be slower, and no worse."""
    target, candidates = Target(arch, MULTIPROCESSORS[arch]), tiles.candidates
    missed, judged = {}, 0
    for layer in conv_layers("simplenet", 256, 128):
        product, geometry = few_channels.product_of(op, target, layer.geometry)
        _, *others = candidates(product, target, geometry, *DTYPES[dtype])
        judged += len(others)
        for tile in others:
            monkeypatch.setattr(tiles, "candidates", lambda *_, tile=tile: (tile,))
            misses = judge(row(op, layer, *DTYPES[dtype], arch), checks=("spills", "fits", "tensor cores", "loads"))
            if misses:
                missed[layer.name, tile] = misses
    assert not missed, "\n".join(f"{k}: {v}" for k, v in missed.items())
    if not judged:
        pytest.skip("one tile for each layer: tuning has no choice")
