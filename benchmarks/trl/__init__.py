"""Real TRL training runs: cost of attaching, and checks of the captured steps."""
