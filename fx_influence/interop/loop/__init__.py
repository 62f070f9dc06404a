"""Attach to any training loop with AdamW: rollouts as the loop names them, coefficients as its loss makes them."""
