"""Ablations: the cells of a named grid over settings, trained one after another, with what they share trained once."""
