"""Optimizers of other libraries that step as AdamW does, and their moments in 8 bits or fewer as values."""
