"""Triton kernels for experts on a GPU. Nothing outside of this package imports triton."""
