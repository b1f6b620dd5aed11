"""Tiles: each is right by itself, and the rules that pick them hold."""

import pytest
import torch
from reference import assert_matches

from kernels import conv2d, ops, runtime, tiles
from kernels.geometry import ConvGeometry
from kernels.runtime import Target

INTERPRETED = Target("interpreter", 1)

CASES = [
    pytest.param((2, 20, 13, 11), (36, 20, 3, 3), {"padding": 1}, id="channels-do-not-divide"),
    pytest.param((3, 3, 17, 15), (24, 3, 5, 5), {"stride": 2, "padding": 2}, id="three-channels"),
    pytest.param((2, 64, 9, 9), (64, 32, 3, 3), {"stride": (2, 1), "padding": 1, "groups": 2}, id="groups-and-stride"),
    pytest.param((3, 40, 9, 11), (80, 1, 3, 5), {"stride": (2, 1), "padding": 1, "groups": 40}, id="depthwise"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_120"])
@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CASES)
def test_gpu_tiles_compute_the_same_when_interpreted(x_shape, w_shape, geometry, arch, dtype, gpu_tiles):
    gpu_tiles(arch)
    assert_matches(conv2d, x_shape, w_shape, dtype, **geometry)


@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CASES)
def test_the_ieee_tile_computes_the_same_when_interpreted(x_shape, w_shape, geometry, gpu_tiles, monkeypatch):
    gpu_tiles("sm_80")
    if w_shape[1] == 1:
        pytest.skip("a depthwise convolution has no product of matrices, and no precision of one")
    monkeypatch.setattr(ops, "precision_for", lambda dtype: "ieee")
    taken = []
    lookup = tiles._lookup
    monkeypatch.setattr(tiles, "_lookup", lambda *a: taken.append(lookup(*a)) or taken[-1])
    assert_matches(conv2d, x_shape, w_shape, torch.float32, **geometry)
    assert set(taken) == {tiles.IEEE_FP32_TILES, tiles.IEEE_WEIGHT_TILES}


def test_the_input_gradient_reads_transposed_weights_in_tf32(gpu_tiles, monkeypatch):
    gpu_tiles("sm_90")
    monkeypatch.setattr(ops, "precision_for", lambda dtype: "tf32")  # which the interpreter does not round to
    copies = []
    with runtime.on_allocate(lambda nbytes, what, tensor: copies.append(what)):
        for x_shape, w_shape, geometry in (case.values for case in CASES):
            assert_matches(conv2d, x_shape, w_shape, torch.float32, **geometry)
    assert "transposed weight" in copies


ADDRESS_CASES = [
    *CASES,
    pytest.param((1, 17, 3, 3), (5, 17, 3, 3), {"padding": 4, "dilation": 2}, id="almost-all-halo"),
    pytest.param((2, 33, 7, 7), (33, 33, 1, 1), {"stride": 3}, id="pointwise-one-past-a-block"),
    pytest.param((1, 17, 12, 12), (3, 17, 9, 9), {"padding": 4}, id="more-taps-than-bits"),
    pytest.param((2, 40, 5, 5), (40, 1, 3, 3), {"padding": 1, "groups": 40}, id="depthwise"),
]


@pytest.mark.parametrize("arch", [None, "sm_80"])
@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), ADDRESS_CASES)
def test_even_masked_addresses_lie_inside_a_tensor(x_shape, w_shape, geometry, arch, gpu_tiles, addresses):
    # A pipelined masked load becomes an asynchronous copy that is not predicated: it must not point outside.
    if arch:
        gpu_tiles(arch)
    tensors = []
    x = torch.randn(x_shape).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(w_shape).to(memory_format=torch.channels_last).requires_grad_()
    with runtime.on_allocate(lambda nbytes, what, tensor: tensors.append(tensor)):
        y = conv2d(x, w, **geometry)
        dy = torch.randn_like(y)
        y.backward(dy)
    assert len(addresses) > 3
    inside = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (x, w, dy, *tensors)]
    for low, high in addresses:
        assert any(start <= low and high < end for start, end in inside), "a block reaches outside its tensor"


def test_split_weight_gradients_are_split_here_and_add_up(gpu_tiles, monkeypatch):
    counts = []
    gpu_tiles("sm_80")
    split = tiles.splits
    monkeypatch.setattr(tiles, "splits", lambda *a, **k: counts.append(split(*a, **k)) or counts[-1])
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_matches(conv2d, (3, 17, 21, 19), (5, 17, 3, 3), torch.float64, padding=1, layout=layout)
    assert min(counts) > 1


def test_a_split_count_is_a_function_of_shape_and_device():
    a100 = Target("sm_80", 108)
    assert tiles.splits(a100, programs=9, steps=4096) == 48  # 4 programs for each of 108 multiprocessors
    assert tiles.splits(a100, programs=9, steps=8) == 2  # at least four steps each
    assert tiles.splits(a100, programs=500, steps=4096) == 1  # the chip is full
    assert tiles.splits(INTERPRETED, programs=1, steps=4096) == 1


def test_gpu_blocks_divide_channels_where_they_can():
    for channels, block in ((64, 64), (96, 32), (48, 16), (20, 32), (3, 16), (512, 64)):
        g = ConvGeometry.of((8, channels, 9, 9), (64, channels, 3, 3))
        tile = tiles.candidates("forward", Target("sm_80", 108), g, torch.float16, "ieee")[0]
        assert (16 if tile.flat else block) == tile.K * tile.parts, channels


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_batch_size_orders_candidates_and_no_more(arch, dtype):
    """A tuned choice serves every batch, so its tile must be one of each batch's."""
    for op in ("forward", "input_grad", "weight_grad"):
        for stride in (1, 2):
            found = {
                frozenset(tiles.candidates(op, Target(arch, 100), g, dtype, "tf32"))
                for N in (1, 7, 256, 4096)
                for g in [ConvGeometry.of((N, 128, 8, 8), (256, 128, 3, 3), stride, 1)]
            }
            assert len(found) == 1


@pytest.mark.parametrize("size", [1, 8, 64, 300])
@pytest.mark.parametrize("channels", [1, 3, 64, 700])
def test_interpreted_blocks_stay_within_tritons_limit(size, channels):
    g = ConvGeometry.of((64, channels, size, size), (channels, channels, 1, 1))
    for op in ("forward", "input_grad", "weight_grad"):
        (tile,) = tiles.candidates(op, INTERPRETED, g, torch.float32, "ieee")
        for block in (tile.M, tile.N, tile.K):
            assert block & (block - 1) == 0
        assert max(tile.M * tile.N, tile.M * tile.K, tile.K * tile.N) <= tiles.LARGEST_BLOCK


def test_a_tile_that_spills_beside_a_mask_has_another():
    """The gate compiles both; here, that they are chosen where the table says."""
    geometry = ConvGeometry.of((256, 64, 32, 32), (64, 64, 3, 3), 1, 1)
    for (_, first, end, spilling), other in tiles.MASKED.items():
        assert spilling != other
        assert first < end
    chosen = {
        op: tiles.candidates(op, Target("sm_86", 82), geometry, torch.float32, "tf32")[0]
        for op in ("input_grad", "input_grad_masked")
    }
    key = ("input_grad", 86, 90, chosen["input_grad"])
    assert chosen["input_grad_masked"] == tiles.MASKED[key]
