"""Checkpoint directories of transformers, PEFT, accelerate and torch.distributed.checkpoint."""
