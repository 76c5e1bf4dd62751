"""FP8 rows, products and layers against fp64: what a number may lose, what a layer loses, and what a layer keeps."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from aadkern import fp8
from aadkern.fp8 import Fp8Linear, QuantisedRows, quantise_rows, scaled_product, shared_input
from aadkern.fp8.api import _torch_product
from tests.fp8.rows import DTYPES, kind_of_rows, relative, strided, uneven_rows

E4M3 = torch.float8_e4m3fn
OF_14B = [pytest.param(5120, 5120, marks=pytest.mark.slow), pytest.param(13824, 5120, marks=pytest.mark.slow)]
WIDTHS = [(1536, 1536), (1536, 8960), (8960, 1536), *OF_14B]


def restored(rows):
    return rows.values.double() * rows.scale.double()


def scaled_weight(linear):
    rows = quantise_rows(linear.weight)
    return rows.values, rows.scale.t().contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_loses_at_most_a_sixteenth_or_half_the_smallest_step(dtype):
    x = uneven_rows(dtype)
    rows = quantise_rows(x)
    assert rows.values.dtype == E4M3 and rows.scale.dtype == torch.float32 and rows.dtype == dtype
    assert rows.values.shape == x.shape and rows.scale.shape == (2, 5, 1)
    allowed = torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * rows.scale.double()) * (1 + 1e-6)
    assert ((restored(rows) - x.double()).abs() <= allowed).all()
    largest = rows.values.double().abs().amax(-1)
    assert (
        (largest[x.abs().amax(-1) > 0] == 448).all()
        and largest[0, 2] == 0
        and torch.equal(rows.scale[0, 2], torch.tensor([2.0**-126]))
    )


def test_rows_know_nothing_of_one_another():
    x = uneven_rows(torch.float32)
    whole, powers = quantise_rows(x), 2.0 ** torch.randint(-9, 9, (2, 5, 1))
    for i in range(2):
        for j in range(5):
            alone = quantise_rows(x[i, j : j + 1])
            assert torch.equal(alone.values.float(), whole.values[i, j : j + 1].float())
    assert torch.equal(quantise_rows(x * powers).values.float(), whole.values.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(bad):
    x, linear = uneven_rows(torch.bfloat16), nn.Linear(96, 32).bfloat16()
    layer, broken = Fp8Linear(linear), x.clone()
    broken[1, 3, 7] = bad
    out, clean = layer(broken), layer(x)
    assert out[1, 3].isnan().all()
    others = torch.ones(2, 5, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(out[others], clean[others]) and clean.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_rows(dtype):
    largest = torch.finfo(dtype).max
    rows = quantise_rows(torch.tensor([[largest, -largest / 2, 0, 1], [1e-40, 0, 0, 0]]).to(dtype))
    assert restored(rows).isfinite().all()
    assert restored(rows)[0, 0].item() == pytest.approx(largest, rel=1e-6)
    assert abs(restored(rows)[1, 0].item()) <= 2e-40


@pytest.mark.parametrize("kind", ["apart", "exchanged", "off"])
def test_any_strides(kind):
    x, layer = uneven_rows(torch.float32), Fp8Linear(nn.Linear(96, 32))
    assert torch.equal(layer(strided(kind, x).detach()), layer(x))


def test_no_rows():
    assert Fp8Linear(nn.Linear(96, 32))(torch.randn(2, 0, 96)).shape == (2, 0, 32)


def operands(dtype, bias):
    """A layer whose bias is as large as its products, its weight in FP8, and rows."""
    linear = nn.Linear(96, 48, bias=bias).requires_grad_(False)
    if bias:
        linear.bias.normal_(std=30)
    linear.to(dtype)
    x = uneven_rows(dtype)
    return linear, *scaled_weight(linear), x, quantise_rows(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_the_numbers_its_operands_stand_for(dtype, bias):
    linear, weight, scale, x, rows = operands(dtype, bias)
    exact = restored(rows) @ (weight.double() * scale.double().t()).t()
    exact = exact if linear.bias is None else exact + linear.bias.double()
    out = scaled_product(rows, weight, scale, linear.bias)
    assert out.dtype == dtype and out.shape == (2, 5, 48)
    assert relative(out, exact) < {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert torch.equal(Fp8Linear(linear)(x), out)


def rowwise_on_the_cpu():
    """torch 2.11's CPU has scaled products with one scale for a whole tensor only."""
    ones = torch.ones(16, 16).to(E4M3)
    try:
        torch._scaled_mm(ones, ones.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not rowwise_on_the_cpu(), reason="this torch has no row-wise scaled product on the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_torchs_own_product_takes_what_the_layer_gives_it(monkeypatch, dtype, bias):
    """The GPU's path, as far as a CPU goes, which takes more than CUDA: what that refuses is refused here."""
    linear, weight, scale, _, rows = operands(dtype, bias)
    product = torch._scaled_mm

    def as_on_cuda(a, b, scale_a, scale_b, bias, *, out_dtype, use_fast_accum):
        assert a.stride() == (96, 1) and b.stride() == (1, 96)
        assert scale_a.shape == (10, 1) and scale_b.shape == (1, 48) and scale_a.is_contiguous() and scale_b.is_contiguous()
        assert bias is None or (out_dtype != torch.float32 and bias.dtype == out_dtype)
        return product(a, b, scale_a, scale_b, bias, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

    monkeypatch.setattr(torch, "_scaled_mm", as_on_cuda)
    theirs = _torch_product(rows.values.flatten(0, -2), rows.scale.flatten(0, -2), weight, scale, linear.bias, dtype, True)
    ours = scaled_product(rows, weight, scale, linear.bias)
    # One rounding each, and 96 products summed in float32 in two orders.
    limit = 2 * torch.finfo(dtype).eps + 96**0.5 * torch.finfo(torch.float32).eps
    assert theirs.dtype == dtype and relative(theirs.view(2, 5, 48), ours.double()) < limit


@pytest.mark.parametrize("fast_accum", [True, False])
def test_a_layer_asks_for_the_sums_it_was_made_for(monkeypatch, fast_accum):
    asked = []
    monkeypatch.setattr("aadkern.fp8.linear.scaled_product", lambda *_, fast_accum: asked.append(fast_accum))
    Fp8Linear(nn.Linear(32, 48), fast_accum)(torch.randn(5, 32))
    assert asked == [fast_accum]


def by_tensor(x, weight):
    """The same product with one scale for all of x and one for all of the weight."""
    sides = []
    for side in (x.float(), weight.float()):
        scale = side.abs().max() / 448
        sides.append((side / scale).to(E4M3).float() * scale)
    return sides[0] @ sides[1].t()


@pytest.mark.parametrize("kind", ["normal", "outlier channels", "uneven tokens", "after gelu"])
@pytest.mark.parametrize(("columns", "outputs"), WIDTHS)
def test_error_at_wans_widths(kind, columns, outputs):
    """docs/fp8.md's table; `pytest -s` prints it. Weights are normal, their rows 1.6 times apart in size."""
    x, weight = kind_of_rows(kind, columns), torch.randn(outputs, columns) * (torch.randn(outputs, 1) / 2).exp()
    linear = nn.utils.skip_init(nn.Linear, columns, outputs, bias=False)
    linear.weight = nn.Parameter((weight * columns**-0.5).bfloat16(), requires_grad=False)
    exact = x.double() @ linear.weight.double().t()
    ours, theirs = Fp8Linear(linear)(x), by_tensor(x, linear.weight)
    (row, worst), (tensor, tensor_worst) = (
        (relative(y, exact), ((y.double() - exact).norm(dim=1) / exact.norm(dim=1)).max().item()) for y in (ours, theirs)
    )
    print(f"\n{columns:6} {outputs:6} {kind:17} rows {row:.2%} worst {worst:.2%}, tensors {tensor:.2%} worst {tensor_worst:.2%}")
    assert 0.02 < row < 0.041 and worst < 0.048
    if kind == "outlier channels":
        assert worst < tensor_worst


def test_one_large_row_costs_the_others_nothing():
    """What a scale for each row is for: beside a row 10^6 times as large, one scale for all flushes the others to zero."""
    x, linear = torch.randn(8, 256), nn.Linear(256, 64, bias=False).requires_grad_(False)
    x[0] *= 1e6
    linear.weight[0] *= 1e6
    exact = (x.double() @ linear.weight.double().t())[1:, 1:]
    assert relative(Fp8Linear(linear)(x)[1:, 1:], exact) < 0.045
    assert relative(by_tensor(x, linear.weight)[1:, 1:], exact) > 0.99


def truncated(x, beside):
    """x as a sum with 13 bits of fraction keeps it beside the number of the largest exponent."""
    step = torch.ldexp(torch.ones_like(beside), torch.frexp(beside)[1] - 14)
    return (x / step).trunc() * step


@pytest.mark.parametrize("columns", [1536, 13824])
def test_accumulators_of_13_bits_do_not_show(columns):
    """docs/fp8.md's figure for ``fast_accum``: a model of Hopper's sums, truncated with every 32 products; no GPU was asked."""
    x, weight = torch.randn(16, columns), torch.randn(32, columns)
    a, b = quantise_rows(x), quantise_rows(weight)
    total = torch.zeros(16, 32, dtype=torch.float64)
    for at in range(0, columns, 32):
        products = a.values[:, None, at : at + 32].double() * b.values[None, :, at : at + 32].double()
        largest = torch.maximum(products.abs().amax(-1), total.abs())
        total = truncated(total, largest) + truncated(products, largest[..., None]).sum(-1)
    exact, scales = x.double() @ weight.double().t(), a.scale.double() * b.scale.double().t()
    full = a.values.double() @ b.values.double().t()
    print(f"\n{columns}: the sums alone {relative(total, full):.2%}, with rounding to e4m3 {relative(total * scales, exact):.2%}")
    assert 1e-4 < relative(total, full) < 0.005
    assert relative(total * scales, exact) < 1.02 * relative(full * scales, exact)


def test_layers_share_one_quantisation(monkeypatch):
    calls = []
    monkeypatch.setattr(fp8.linear, "quantise_rows", lambda x: calls.append(1) or quantise_rows(x))
    layers, x = [Fp8Linear(nn.Linear(32, 48)) for _ in range(3)], torch.randn(2, 7, 32)
    calls.clear()
    shared = shared_input(x, *layers)
    outs = [layer(shared) for layer in layers]
    assert isinstance(shared, QuantisedRows) and len(calls) == 1
    assert all(torch.equal(out, layer(x)) for out, layer in zip(outs, layers, strict=True))
    plain = nn.Linear(32, 48)
    assert shared_input(x, plain, plain) is x and shared_input(x, layers[0], plain) is x


def test_no_gradient():
    layer, x = Fp8Linear(nn.Linear(32, 16)), torch.randn(4, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no gradient.*torch\.no_grad"):
        layer(x)
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert not layer(x.detach()).requires_grad and [p for p in layer.parameters() if p.requires_grad] == []


def test_a_model_moved_to_another_dtype_keeps_its_weights():
    model = nn.Sequential(Fp8Linear(nn.Linear(32, 48)), nn.GELU(), Fp8Linear(nn.Linear(48, 16, bias=False)))
    x, before = torch.randn(5, 32), copy.deepcopy(model.state_dict())
    for move in (model.bfloat16, model.half, model.float, lambda: model.to("cpu", torch.bfloat16)):
        move()
        assert model[0].weight_e4m3.dtype == E4M3 and model[0].weight_scale.dtype == torch.float32
        assert model(x.to(model[0].bias.dtype)).dtype == model[0].bias.dtype
    for name, tensor in model.state_dict().items():
        assert name.endswith("bias") or torch.equal(tensor.float(), before[name].float())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend):
    layer, x = Fp8Linear(nn.Linear(64, 48)).bfloat16(), torch.randn(3, 5, 64).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative(compiled(x), layer(x).double()) < 4e-3


def test_autocast_changes_nothing():
    layer, x = Fp8Linear(nn.Linear(64, 48)), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.clone()))
        inside = layer(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, layer(x))


def test_a_state_dict_loads_into_layers_of_its_kind_only():
    layer, other = Fp8Linear(nn.Linear(32, 48)), Fp8Linear(nn.Linear(32, 48))
    file, x = io.BytesIO(), torch.randn(5, 32)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="weight_e4m3"):
        nn.Linear(32, 48).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="weight_e4m3"):
        layer.load_state_dict(nn.Linear(32, 48).state_dict())


WEIGHT, SCALE = torch.randn(16, 32).to(E4M3), torch.ones(1, 16)
ROWS = QuantisedRows(torch.randn(3, 32).to(E4M3), torch.ones(3, 1), torch.float32)
NARROW = ROWS._replace(values=torch.randn(3, 16).to(E4M3))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, got list", lambda: quantise_rows([1.0])),
        (TypeError, "x must be float32, float16 or bfloat16, got torch.float64", lambda: quantise_rows(torch.randn(2, 3).double())),
        (TypeError, "x must be float32, float16 or bfloat16, got torch.float8_e4m3fn", lambda: quantise_rows(WEIGHT)),
        (ValueError, r"x must be \[..., rows, channels\] .*, got \[3\]", lambda: quantise_rows(torch.randn(3))),
        (ValueError, r"at least one channel, got \[3, 0\]", lambda: quantise_rows(torch.randn(3, 0))),
        (ValueError, "backend must be one of .*, got 'cuda'", lambda: quantise_rows(torch.randn(2, 3), backend="cuda")),
        (TypeError, "rows must be float8_e4m3fn", lambda: scaled_product(ROWS._replace(values=torch.ones(3, 32)), WEIGHT, SCALE)),
        (TypeError, "weight must be float8_e4m3fn, got torch.float32", lambda: scaled_product(ROWS, torch.ones(16, 32), SCALE)),
        (ValueError, r"weight must be .*16, got \[9, 32\]", lambda: scaled_product(ROWS, WEIGHT[:9], SCALE)),
        (ValueError, "weight must be .*contiguous", lambda: scaled_product(ROWS, WEIGHT.repeat(2, 1).t(), SCALE)),
        (ValueError, "rows must have weight's 32 channels, got 16", lambda: scaled_product(NARROW, WEIGHT, SCALE)),
        (TypeError, "weight_scale must be float32, got torch.float64", lambda: scaled_product(ROWS, WEIGHT, SCALE.double())),
        (ValueError, r"weight_scale must be \[1, 16\], got \[16, 1\]", lambda: scaled_product(ROWS, WEIGHT, SCALE.t())),
        (ValueError, r"bias must be \[16\] or None, got \[8\]", lambda: scaled_product(ROWS, WEIGHT, SCALE, torch.ones(8))),
        (TypeError, "x must be float32, float16 or bfloat16", lambda: Fp8Linear(nn.Linear(32, 16))(torch.randn(2, 32).double())),
        (ValueError, "x must be .*32., at least two", lambda: Fp8Linear(nn.Linear(32, 16))(torch.randn(2, 48))),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_what_is_no_row_weight_or_layer_is_named():
    _, weight, scale, _, rows = operands(torch.bfloat16, False)
    cases = [
        (TypeError, "rows must be QuantisedRows", (torch.randn(5, 96), weight, scale)),
        (TypeError, "weight must be a torch.Tensor, got NoneType", (rows, None, scale)),
        (TypeError, "weight_scale must be a torch.Tensor, got float", (rows, weight, 1.0)),
        (ValueError, "rows must have a scale of float32", (rows._replace(scale=rows.scale[..., 0]), weight, scale)),
        (ValueError, "rows must have a scale of float32", (rows._replace(scale=rows.scale.double()), weight, scale)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            scaled_product(*arguments)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv1d"):
        Fp8Linear(nn.Conv1d(16, 16, 1))
