"""A GRPO training run on tasks of two sources, of which one is too hard, and what its ledger is checked with."""
