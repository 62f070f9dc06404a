"""What is measured: `python -m benchmarks` lists and runs it."""
