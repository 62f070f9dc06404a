"""Sweeps over finite steps in figures: how linear they are, how noisy, and how they agree with the derivative."""
