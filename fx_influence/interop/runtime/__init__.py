"""Processes, run directories and the environment of a run."""
