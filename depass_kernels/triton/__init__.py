"""The ops as Triton kernels, one file per kernel. Import a file of this package only where triton is there."""
