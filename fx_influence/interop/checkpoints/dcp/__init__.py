"""Directories of ``torch.distributed.checkpoint``, read without unpickling."""
