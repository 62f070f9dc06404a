"""Batches cut into micro-batches: selection of rows, padding-free alignment, and packing of shared prompts."""
