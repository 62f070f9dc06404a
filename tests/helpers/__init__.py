"""Models, batches, reference comparisons and rank scripts that several tests share."""
