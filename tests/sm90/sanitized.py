"""Small runs of the kernels for sm_90a: ``compute-sanitizer --tool memcheck python -m tests.sm90.sanitized``.

Inputs are made and results judged on the CPU, so that next to no other kernel runs under the tool, which slows them all.
"""

from __future__ import annotations

import sys

import torch

from aadkern import AttentionPlan, runtime, testing
from aadkern.range_attention import sm90, sm90_tables

# Tails on both sides, a range of one key, a run that sees nothing, keys that nobody sees.
PLAN = AttentionPlan.from_ranges(210, 300, [((0, 131), [(0, 140), (150, 151)]), ((140, 210), [(20, 299)])])


def run(dtype: torch.dtype, head_dim: int, device: str = "cuda") -> None:
    """Every forward kernel, both orders and all forms of the backward, on strided inputs; raises where one is wrong."""
    scale = head_dim**-0.5
    q, k, v = testing.make_inputs(PLAN, 2, head_dim, dtype, layout="sliced")
    dout, dlse = testing.make_gradients(q)
    truth, plain = (f(q, k, v, PLAN, scale, dout, dlse) for f in (testing.exact, testing.eager))
    there = [x.to(device) for x in (q, k, v, dout, dlse)]
    for kernel in sm90.FORWARD_KERNELS:
        out, lse = sm90.forward(*there[:3], PLAN, scale, kernel)
        for deterministic in (False, True):
            gradients = sm90.backward(*there[3:], *there[:3], out, lse, PLAN, scale, deterministic)
            testing.assert_results_close(testing.Results(*(x.cpu() for x in (out, lse, *gradients))), truth, plain)
    for rows in sm90_tables.QUERY_ROWS[head_dim][1:]:
        gradients = sm90.backward(*there[3:], *there[:3], out, lse, PLAN, scale, rows=rows)
        testing.assert_results_close(testing.Results(*(x.cpu() for x in (out, lse, *gradients))), truth, plain)


def main() -> None:
    reason = runtime.reason_against("sm90", "cuda")
    if reason is not None:
        sys.exit(f"sm90: {reason}")
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 128):
            run(dtype, head_dim)
    print("every result is right")


if __name__ == "__main__":
    main()
