"""Memory and time of a recipe's stages on GPUs that are not there yet: ``aad plan``."""
