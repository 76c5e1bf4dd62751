"""Pooling by query tokens: attention of a few learned queries over many tokens, without forming keys or values."""
