"""Experiments: plan, run, store, report, and the command line."""
