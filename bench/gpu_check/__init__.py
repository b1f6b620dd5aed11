"""gpu-check: what holds of the kernels on the GPU at hand, in one report. See command.py."""
