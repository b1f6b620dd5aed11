"""2-D convolution as unfold -> GEMM, fused in Triton so that the unfolded matrix never exists."""

from kernels.conv2d import Conv2d, LazyConv2d, conv2d, swap_conv2d

__all__ = ["Conv2d", "LazyConv2d", "conv2d", "swap_conv2d"]
