"""Derivatives of token values: gradients, directional derivatives, per-sample gradients and their inner products."""
