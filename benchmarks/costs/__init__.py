"""Costs in time, memory, precision and bytes sent, beside baselines written by hand."""
