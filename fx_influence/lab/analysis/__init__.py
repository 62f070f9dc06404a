"""What the stored arrays of a run say: pure functions over numpy arrays."""
