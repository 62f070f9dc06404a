"""Checkpoints with one file for each rank of FSDP, as verl, SkyRL and AReaL write them."""
