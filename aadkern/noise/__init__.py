"""Noise by counter: the same numbers on every device, for every launch shape and for every way to share out a batch."""
