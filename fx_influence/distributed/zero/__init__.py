"""Tensors that DeepSpeed's ZeRO partitions: the optimizer's (stages 1 and 2), or the parameters too (stage 3)."""
