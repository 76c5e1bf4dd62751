"""How a network learns: optimisers and schedules, averaged weights, and both around one module."""
