"""Attention over plans of key ranges: one operator, several interchangeable backends."""
