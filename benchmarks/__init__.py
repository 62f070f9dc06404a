"""Benchmarks and experiments: `python -m benchmarks` lists and runs it."""
