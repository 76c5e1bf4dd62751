"""Other people's dense kernels as a backend on a GPU, whichever is installed there, against fp64. Unverified: not run there yet."""

from __future__ import annotations

import pytest
import torch

import aadkern
from aadkern import runtime, testing
from tests.attention.gpu_cases import ALL_PLANS, DEVICE, DTYPES, VIDEO, draw

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def served():
    reason = runtime.reason_against("flash", DEVICE)
    if reason is not None:
        pytest.skip(reason)


def check(q, k, v, plan, dout, dlse=None, scale=None, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = aadkern.attention(*leaves, plan, return_lse=True, scale=scale, backend="flash", **options)
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    actual = testing.Results(out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, gradients))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    truth, plain = (f(q, k, v, plan, scale, dout, dlse) for f in (testing.exact, testing.eager))
    testing.assert_results_close(actual, truth, plain)


@pytest.mark.parametrize("plan", ALL_PLANS.values(), ids=ALL_PLANS)
@pytest.mark.parametrize("head_dim", [64, 128])
@DTYPES
def test_results_of_every_plan(plan, dtype, head_dim):
    (q, k, v), (dout, dlse) = draw(plan, head_dim, dtype, 1, heads=3, batch=2)
    check(q, k, v, plan, dout)
    check(q, k, v, plan, dout, dlse, scale=-0.2)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_any_strides(layout):
    (q, k, v), (dout, _) = draw(VIDEO, 128, torch.bfloat16, 2, layout=layout)
    check(q, k, v, VIDEO, dout, deterministic=True)
