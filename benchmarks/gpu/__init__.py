"""Measurements of the methods for influences on a CUDA device: ``python -m benchmarks.gpu``."""
