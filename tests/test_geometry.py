"""Sizes of a convolution, checked without any kernel."""

import itertools

import pytest
import torch

from kernels.geometry import ConvGeometry, pair


def test_output_sizes_are_pytorchs_over_a_grid_of_geometries():
    checked = 0
    grid = itertools.product((1, 4, 7, 8), (1, 2, 3), (1, 2, 3), (0, 1, 4), (1, 2))
    for size, kernel, stride, padding, dilation in grid:
        x, w = torch.empty(2, 4, size, size + 1, device="meta"), torch.empty(6, 2, kernel, 1, device="meta")
        try:
            expected = torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, 2).shape
        except RuntimeError:
            with pytest.raises(RuntimeError):
                ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, 2)
            continue
        assert ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, 2).y_shape == expected
        checked += 1
    assert checked > 100


def test_shapes_come_back_and_groups_divide_channels():
    g = ConvGeometry.of((5, 12, 9, 8), (6, 4, 3, 2), (2, 1), (1, 0), 1, 3)
    assert (g.x_shape, g.w_shape, g.y_shape) == ((5, 12, 9, 8), (6, 4, 3, 2), (5, 6, 5, 7))
    assert (g.Ci_group, g.Co_group) == (4, 2)
    assert g.multiply_adds == 5 * 6 * 5 * 7 * 4 * 3 * 2


def test_pairs():
    assert pair(3, "stride") == pair((3,), "stride") == (3, 3)
    assert pair([1, 2], "stride") == (1, 2)
    with pytest.raises(TypeError, match="must be an int"):
        pair(1.5, "stride")
    with pytest.raises(RuntimeError, match=r"a list of 2 values .* stride=\[1, 2, 3\]"):
        pair((1, 2, 3), "stride")


@pytest.mark.parametrize(
    ("x_shape", "dilation"),
    [((1, 1, 2**16 + 1, 2**15), (2**16, 1)), ((1, 1, 214_748_365, 10), (214_748_364, 9))],
    ids=["by-rows", "by-rows-and-columns"],
)
def test_a_filter_that_spans_2_to_the_31_pixels_is_refused(x_shape, dilation):
    with pytest.raises(RuntimeError, match=r"spans 2\*\*31 pixels or more"):
        ConvGeometry.of(x_shape, (1, 1, 2, 2), dilation=dilation)


def test_one_row_or_column_of_a_filter_is_not_dilated():
    g = ConvGeometry.of((1, 1, 5, 5), (1, 1, 1, 2), dilation=(7, 2))
    assert (g.DH, g.DW, g.P, g.Q) == (1, 2, 5, 3)


def test_padding_of_2_to_the_30_and_2_to_the_31_channels_are_refused():
    with pytest.raises(RuntimeError, match=r"must stay below 2\*\*30 pixels"):
        ConvGeometry.of((1, 2, 5, 1), (2, 2, 3, 1), (2**30, 1), (2**31 - 3, 0), (2**30 - 1, 1))
    for groups in (1, 2**31 + 40):
        with pytest.raises(RuntimeError, match=r"below 2\*\*31 channels"):
            ConvGeometry.of((1, groups, 1, 1), (2**31 + 40, 1, 1, 1), groups=groups)
