"""Store the measured steps of a TRL training run as run directories."""
