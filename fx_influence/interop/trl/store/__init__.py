"""Store the measured steps of a TRL training as run directories."""
