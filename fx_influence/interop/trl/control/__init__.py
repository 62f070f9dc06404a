"""A TRL training run whose entropy is held at a target."""
