"""The mathematics that every stage shares: noise levels and conversions, steps of a sampler, losses, random draws."""
