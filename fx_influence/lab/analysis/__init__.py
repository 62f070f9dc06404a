"""Statistics of the stored arrays of a run: pure functions over numpy arrays."""
