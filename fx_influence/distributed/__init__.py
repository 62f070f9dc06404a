"""The same passes over several processes: rows partitioned over ranks, and parameters sharded by FSDP2 or ZeRO-3."""
