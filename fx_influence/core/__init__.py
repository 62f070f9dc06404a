"""Foundations of every other room: arithmetic on parameter dictionaries, sharded tensors, input checks, display."""
