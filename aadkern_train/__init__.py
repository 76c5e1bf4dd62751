"""The training layer on aadkern: AAD-1's three stages, their worlds, metrics and reports."""
