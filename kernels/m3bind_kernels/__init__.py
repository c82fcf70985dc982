"""Triton kernels of m3bind. This package imports torch and triton only; it has no kernels yet."""
