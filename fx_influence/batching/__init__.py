"""Batches cut into micro-batches, and rows packed so that shared prompts go through the model once."""
