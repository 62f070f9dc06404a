"""A training run as values: its measured steps, the account of its entropy, checks, and sentences about both."""
