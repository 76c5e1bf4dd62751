"""Benchmarks: an operation is timed only behind a passing check of its numbers, beside its rivals, in one process."""
