"""Checkpoints of DeepSpeed's ZeRO, whose tensors are partitioned over ranks."""
