"""Error bars over the draw of E: of influences, of the step, and of sums over labels."""
