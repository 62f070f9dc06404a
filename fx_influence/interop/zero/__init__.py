"""Training runs under DeepSpeed's ZeRO stages 1 and 2, whose moments and gradients are partitioned over processes."""
