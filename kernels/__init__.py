"""Similarity kernels: one op = a plain PyTorch reference and a Triton kernel."""
