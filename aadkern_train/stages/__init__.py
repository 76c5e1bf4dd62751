"""The stages of AAD-1, each a small class: the networks it owns, their losses, and who updates when."""
