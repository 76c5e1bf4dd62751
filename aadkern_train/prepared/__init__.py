"""Prepared data: captions and latents, embedded and encoded once, kept in shards that are read by position."""
