"""Facts about e4m3, and the range of the scales: what the reference and the kernel must agree on."""

from __future__ import annotations

LARGEST = 448.0  # below 2^-6 its numbers are 2^-9 apart, above it 2^-3 of a power of two
SMALLEST_SCALE = 2.0**-126  # a row of zeros has it; its reciprocal is still finite in float32
