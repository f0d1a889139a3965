"""Triton kernels that run a plan on a GPU; the reference in the folder above says what they compute."""
