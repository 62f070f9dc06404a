"""Optimizer steps as stateless maps from gradients to directions."""
