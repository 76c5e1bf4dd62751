"""FP8 (e4m3) products for inference: rows of 8-bit numbers with a scale each, torch's scaled product of them, a linear layer."""

from __future__ import annotations

from aadkern.fp8.api import QuantisedRows, quantise_rows, scaled_product
from aadkern.fp8.linear import Fp8Linear, shared_input

__all__ = ["Fp8Linear", "QuantisedRows", "quantise_rows", "scaled_product", "shared_input"]
