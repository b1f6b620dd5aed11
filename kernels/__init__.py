"""2-D convolution as unfold -> GEMM, fused in Triton so that the unfolded matrix never exists."""

from kernels.conv2d import Conv2d, LazyConv2d, conv2d, swap_conv2d
from kernels.fusion import fuse, fusion_report
from kernels.max_pool2d import MaxPool2d, max_pool2d

__all__ = ["Conv2d", "LazyConv2d", "MaxPool2d", "conv2d", "fuse", "fusion_report", "max_pool2d", "swap_conv2d"]
