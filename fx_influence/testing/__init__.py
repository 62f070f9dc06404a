"""The slow, literal definition of every quantity, for tests and benchmarks."""
