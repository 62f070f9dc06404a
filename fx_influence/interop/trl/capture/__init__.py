"""Record what a TRL trainer computes in a step and never returns: its batch, its loss's coefficients, its clipping."""
