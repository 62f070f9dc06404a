"""Influence over several optimizer steps: derivatives through a recorded window of the training run."""
