"""Parts of measuring a live training run that any trainer can use: steps, measurement, metrics, checks."""
