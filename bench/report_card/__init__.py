"""What the compiler's output says of the convolution kernels, without a GPU; and what a GPU's times add to it."""
