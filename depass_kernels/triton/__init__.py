"""The ops as Triton kernels, one file per kernel. The files need triton to be installed."""
