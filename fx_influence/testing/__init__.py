"""The slow, literal definition of everything, for tests and benchmarks."""
