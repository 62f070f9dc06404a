"""Models whose parameters DeepSpeed's ZeRO-3 partitions."""
