"""Pooling by query tokens: the meaning, the fast path in torch against it, and the public function."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aadkern
from aadkern import ops
from aadkern.pooling import reference, torch_keys, torch_path
from tests.pooling.pooling_cases import DEFAULTS, check, gradient_for, make, results, run, with_lse

BACKENDS = ["reference", "torch"]
FORMS = [(norm, keys) for norm in ("rms", "layer", None) for keys in (None, "head", "full")]


def pool(tensors, settings, backend="torch", **more):
    return aadkern.attention_pool(**tensors, **settings, backend=backend, **more)


def test_the_reference_says_what_a_loop_over_tokens_says():
    tensors, settings = make(norm="layer", keys="head", batch=1, length=6, channels=4, heads=2, queries=1, segments=2)
    x, q = tensors["x"][0], tensors["query"][0]
    expected = torch.empty(2, 4, dtype=torch.float64)
    for segment in range(2):
        for head in (slice(0, 2), slice(2, 4)):
            scores, values = [], []
            for token in x[3 * segment : 3 * segment + 3]:
                y = (token - token.mean()) / math.sqrt(token.var(correction=0) + 1e-6)
                y = y * tensors["norm_weight"] + tensors["norm_bias"]
                k = (tensors["w_k"] @ y + tensors["b_k"])[head]
                k = k / math.sqrt(k.square().mean() + 1e-6) * tensors["k_norm_weight"]
                scores.append(math.exp(k @ q[head] / math.sqrt(2)))
                values.append((tensors["w_v"] @ y + tensors["b_v"])[head])
            expected[segment, head] = sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores)
    torch.testing.assert_close(pool(tensors, settings, "reference")[0, :, 0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [True, False])
def test_the_width_of_the_key_norm_is_read_off_its_weight(backend, full):
    tensors, settings = make(norm=None, keys="full" if full else "head", biases=False, length=5)
    k = tensors["x"] @ tensors["w_k"].T
    groups = k if full else k.unflatten(-1, (4, 4))
    k = groups / groups.square().mean(-1, keepdim=True).add(1e-6).sqrt() * tensors["k_norm_weight"]
    plain = {name: x for name, x in tensors.items() if name != "k_norm_weight"} | {"w_k": torch.eye(16, dtype=torch.float64)}
    for m in range(2):
        scores = (k.unflatten(-1, (4, 4)) if full else k) * tensors["query"][m].unflatten(-1, (4, 4))
        p = torch.softmax(scores.sum(-1) / 2, 1)  # [B, L, H]
        values = (plain["x"] @ tensors["w_v"].T).unflatten(-1, (4, 4))
        expected = (p[..., None] * values).sum(1).flatten(-2)
        torch.testing.assert_close(pool(tensors, settings, backend)[:, 0, m], expected)


@pytest.mark.parametrize(("norm", "keys"), FORMS)
@pytest.mark.parametrize(("queries", "heads", "segments"), [(1, 4, 1), (3, 1, 3), (2, 8, 4)])
def test_absorbing_the_projections_changes_nothing_in_fp64(norm, keys, queries, heads, segments):
    tensors, settings = make(norm=norm, keys=keys, queries=queries, heads=heads, segments=segments)
    gradient = gradient_for(tensors, settings)
    exact, ours = (run(aadkern.attention_pool, tensors, gradient, backend=backend, **settings) for backend in BACKENDS)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    if keys is None:
        assert (ours["b_k"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "keys"), FORMS)
def test_errors_are_within_twice_those_of_the_layer_it_replaces(norm, keys, dtype, monkeypatch):
    monkeypatch.setattr(torch_path, "PIECE", 50)  # 160 tokens in pieces, the last one shorter
    monkeypatch.setattr(torch_keys, "CHUNK", 50)
    sizes = {"length": 160, "channels": 128, "heads": 4, "segments": 2, "batch": 1}
    # 8 problems: of 3, the largest errors lay outside in one draw of 40.
    check("torch", *(make(norm=norm, keys=keys, dtype=dtype, **sizes) for _ in range(8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_segment_is_pooled_by_itself(backend):
    tensors, settings = make(segments=3, keys="full", norm="layer")
    together = pool(tensors, settings, backend)
    for f in range(3):
        alone = pool(tensors | {"x": tensors["x"][:, 4 * f : 4 * f + 4]}, settings | {"segments": 1}, backend)
        torch.testing.assert_close(together[:, f], alone[:, 0])


def test_the_order_of_tokens_does_not_matter():
    tensors, settings = make(length=40)
    shuffled = tensors | {"x": tensors["x"][:, torch.randperm(40)]}
    torch.testing.assert_close(pool(shuffled, settings), pool(tensors, settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_ten_thousand(dtype):
    tensors, settings = make(length=30, dtype=torch.float64)
    tensors["query"] *= 5000
    actual = check("torch", ({name: x.to(dtype) for name, x in tensors.items()}, settings))
    assert actual["out"][0].abs().max() > 0.1


@pytest.mark.parametrize("size", [30, 1000])
def test_a_layer_norm_of_tokens_far_from_zero(size):
    tensors, settings = make(norm="layer", length=30, channels=64)
    tensors["x"] += size
    check("torch", ({name: x.float() for name, x in tensors.items()}, settings))


@pytest.mark.parametrize("keys", [None, "head"])
def test_bf16_tokens_with_fp32_weights(keys):
    tensors, settings = make(keys=keys, length=40, channels=64, dtype=torch.bfloat16)
    wide = {name: x if name == "x" else x.float() for name, x in tensors.items()}
    gradient = gradient_for(tensors, settings)
    wanted = results("torch", tensors, settings, gradient)
    for name, x in run(aadkern.attention_pool, wide, gradient, backend="torch", **settings).items():
        assert x.dtype == (torch.bfloat16 if name in ("x", "out") else torch.float32)
        error, allowed = ((y.double() - wanted[name][1]).norm() for y in (x, wanted[name][2]))
        assert error <= 2 * allowed + 1e-12, name


@pytest.mark.parametrize("keys", [None, "full"])
def test_any_strides(keys):
    tensors, settings = make(keys=keys, segments=3)
    gradient = gradient_for(tensors, settings)
    x = tensors["x"]
    wide = torch.randn(2, 14, 24, dtype=x.dtype)
    wide[:, 1:13, 4:20] = x
    offset = torch.randn(x.numel() + 1, dtype=x.dtype)
    offset[1:] = x.flatten()
    layouts = [wide[:, 1:13, 4:20], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT, offset[1:].view(x.shape)]
    turned = {name: y.T.contiguous().T if y.dim() == 2 else y for name, y in tensors.items()}
    expected = run(aadkern.attention_pool, tensors, gradient, backend="torch", **settings)
    for layout in layouts:
        actual = run(aadkern.attention_pool, turned | {"x": layout}, gradient.mT.contiguous().mT, backend="torch", **settings)
        torch.testing.assert_close(actual, expected)
    one = x[:1].expand(2, -1, -1)
    torch.testing.assert_close(pool(tensors | {"x": one}, settings), pool(tensors | {"x": one.contiguous()}, settings))
    leaf = x.clone().requires_grad_()
    pool(tensors | {"x": leaf}, settings).sum().backward()  # a gradient of stride 0
    torch.testing.assert_close(
        leaf.grad, run(aadkern.attention_pool, tensors, torch.ones_like(gradient), backend="torch", **settings)["x"]
    )


@pytest.mark.parametrize("keys", [None, "head"])
def test_bad_numbers_stay_in_their_segment(keys):
    tensors, settings = make(segments=3, keys=keys)
    clean = pool(tensors, settings)
    for bad in (math.nan, math.inf):
        broken = tensors["x"].clone()
        broken[0, 5, 3] = bad
        out = pool(tensors | {"x": broken}, settings)
        assert out[0, 1].isnan().all()
        assert torch.equal(out[1], clean[1]) and torch.equal(out[0, [0, 2]], clean[0, [0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [None, "head"])
def test_nothing_to_pool(backend, keys):
    for size in ({"batch": 0}, {"queries": 0}):
        tensors, settings = make(keys=keys, **size)
        results = run(aadkern.attention_pool, tensors, gradient_for(tensors, settings), backend=backend, **settings)
        assert results["out"].numel() == 0 and results["x"].shape == tensors["x"].shape
        assert all((x == 0).all() for x in results.values())


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation makes, rather than views."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            for result in results if isinstance(results, tuple) else (results,):
                self.numel = max(self.numel, result.numel())
        return results


def test_neither_keys_nor_values_are_formed(monkeypatch):
    length, channels = 2048, 64
    x, u = torch.randn(1, length, channels), torch.randn(8, channels)
    with Largest() as absorbed:
        torch_path.forward(x, u, None, "rms", 1e-6, 1)
    assert absorbed.numel == length * 8
    monkeypatch.setattr(torch_keys, "CHUNK", 128)
    with Largest() as chunked:
        torch_keys.forward(x, torch.randn(8, 1, 8), torch.randn(channels, channels), None, False, "rms", 1e-6, 1)
    assert chunked.numel == length * 8  # the scores; a chunk's keys are 128 * 64


@pytest.mark.parametrize("keys", [None, "head"])
def test_nothing_as_large_as_x_is_kept_for_the_backward(keys):
    tensors, settings = make(keys=keys, length=256, channels=64)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pool(tensors, settings)
    size = tensors["x"].numel()
    assert {x.untyped_storage().data_ptr() for x in kept if x.numel() >= size} == {tensors["x"].untyped_storage().data_ptr()}


@pytest.mark.parametrize(("norm", "keys"), FORMS)
def test_operators_keep_to_their_schemas(norm, keys):
    tensors, _ = make(norm=norm, keys=keys, segments=3, dtype=torch.float32)
    x, u = tensors["x"].requires_grad_(), torch.randn(8, 16, requires_grad=True)
    query, b = torch.randn(4, 2, 4, requires_grad=True), tensors["b_k"].requires_grad_()
    if keys is None:
        torch.library.opcheck(ops.pool_tokens, (x, u, None, norm, 1e-6, 3, "torch"))
        pooled, *kept = ops.pool_tokens(x.detach(), u.detach(), None, norm, 1e-6, 3, "torch")
        backward = (torch.randn_like(pooled), x.detach(), u.detach(), *kept, norm, 3, "torch")
        torch.library.opcheck(ops.pool_tokens_backward, backward)
        return
    of_keys = (x, query, tensors["w_k"].requires_grad_(), b if keys == "full" else None, keys == "full", norm, 1e-6)
    torch.library.opcheck(ops.key_scores, (*of_keys, 3))
    scores = ops.key_scores(*of_keys, 3).detach().requires_grad_()
    torch.library.opcheck(ops.pool_tokens, (x, None, scores, norm, 1e-6, 3, "torch"))
    torch.library.opcheck(
        ops.key_scores_backward,
        (torch.randn_like(scores), *(y if y is None or not torch.is_tensor(y) else y.detach() for y in of_keys)),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "keys"), FORMS)
def test_lse_is_that_of_the_whole_scores_and_has_its_gradient(norm, keys, backend):
    for of_pooled in (True, False):
        ours, expected = with_lse(backend, *make(norm=norm, keys=keys, queries=3, segments=2), of_pooled)
        assert ours["lse"].shape == (2, 2, 3, 4)
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("norm", "keys"), FORMS)
def test_gradcheck(norm, keys):
    tensors, settings = make(norm=norm, keys=keys, batch=1, length=4, channels=4, heads=2, segments=2)
    names = list(tensors)
    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *values: pool(dict(zip(names, values, strict=True)), settings), leaves)


@pytest.mark.parametrize("keys", [None, "head"])
def test_compiled_for_changing_batch_sizes(keys):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **given: 2 * aadkern.attention_pool(**given), fullgraph=True, backend=counter)
    for batch in (2, 3, 4):
        tensors, settings = make(keys=keys, batch=batch, segments=3)
        gradient = gradient_for(tensors, settings)
        expected = run(lambda **given: 2 * aadkern.attention_pool(**given), tensors, gradient, **settings)
        torch.testing.assert_close(run(compiled, tensors, gradient, **settings), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("keys", [None, "head"])
def test_autocast_changes_nothing(keys):
    tensors, settings = make(keys=keys, dtype=torch.float32)
    expected = pool(tensors, settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool(tensors, settings), expected)


@pytest.mark.parametrize("keys", [None, "head"])
def test_gradients_of_some_inputs_again_and_again(keys):
    tensors, settings = make(keys=keys, norm="layer")
    gradient = gradient_for(tensors, settings)
    full = run(aadkern.attention_pool, tensors, gradient, **settings)
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        (grad,) = torch.autograd.grad(pool(tensors | {name: leaf}, settings, None), leaf, gradient)
        torch.testing.assert_close(grad, full[name], rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert not pool({name: x.requires_grad_() for name, x in tensors.items()}, settings).requires_grad


def test_a_second_derivative():
    tensors, settings = make()
    x = tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(pool(tensors, settings).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*reference"):
        torch.autograd.grad(grad.sum(), x)
    (grad,) = torch.autograd.grad(pool(tensors, settings, "reference").square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0


def test_offsets_beyond_31_bits():
    storage = torch.empty(2**31 + 2**20, dtype=torch.float16)
    for shape, strides in (((1, 3, 16), (16, 2**30, 1)), ((3, 2, 16), (2**30, 16, 1))):
        far = storage.as_strided(shape, strides)
        tensors, settings = make(batch=shape[0], length=shape[1], dtype=torch.float16)
        far.copy_(tensors["x"])
        assert torch.equal(pool(tensors | {"x": far}, settings), pool(tensors, settings))


def test_inputs_are_left_alone():
    tensors, settings = make()
    before = {name: x.clone() for name, x in tensors.items()}
    results = run(aadkern.attention_pool, tensors, gradient_for(tensors, settings), **settings)
    assert all(torch.equal(before[name], x) for name, x in tensors.items())
    assert {x.untyped_storage().data_ptr() for x in results.values()}.isdisjoint(
        x.untyped_storage().data_ptr() for x in tensors.values()
    )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
        ({"x": torch.ones(2, 12, 16, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"x": torch.ones(12, 16)}, ValueError, r"x must be \[batch, length, channels\]"),
        ({"x": torch.ones(2, 0, 16)}, ValueError, "at least one token"),
        ({"heads": 3}, ValueError, "heads must divide the channels 16 of x, got 3"),
        ({"heads": 0}, ValueError, "heads must divide"),
        ({"heads": 2.0}, TypeError, "heads must be an integer"),
        ({"segments": 5}, ValueError, "segments must divide the length 12 of x, got 5"),
        ({"segments": -1}, ValueError, "segments must divide"),
        ({"segments": True}, TypeError, "segments must be an integer"),
        ({"norm": "batch"}, ValueError, 'norm must be "rms", "layer" or None'),
        ({"norm": None}, ValueError, 'norm_weight needs norm "rms" or "layer", got norm None'),
        ({"norm_bias": torch.ones(16)}, ValueError, "norm_bias needs norm \"layer\", got norm 'rms'"),
        ({"eps": -1e-6}, ValueError, "eps must be finite and not negative"),
        ({"eps": math.nan}, ValueError, "eps must be finite"),
        ({"eps": "1e-6"}, TypeError, "eps must be a real number"),
        ({"backend": "sdpa"}, ValueError, "backend must be one of reference, torch, triton"),
        ({"backend": "triton"}, ValueError, "attention_pool: backend 'triton' cannot serve"),
        ({"query": torch.ones(16)}, ValueError, r"query must be \[M, 16\], got \[16\]"),
        ({"query": torch.ones(2, 16).half()}, TypeError, "query must have x's dtype torch.float32, got torch.float16"),
        ({"w_k": None}, TypeError, r"w_k must be a torch\.Tensor"),
        ({"w_k": torch.ones(8, 16)}, ValueError, r"w_k must be \[16, 16\]"),
        ({"w_v": torch.ones(16, 16).double()}, TypeError, "w_v must have x's dtype"),
        ({"w_v": torch.ones(16, 16, device="meta")}, ValueError, "w_v must be on x's device cpu, got meta"),
        ({"b_k": torch.ones(4)}, ValueError, r"b_k must be \[16\]"),
        ({"b_v": 1.0}, TypeError, r"b_v must be a torch\.Tensor"),
        ({"norm_weight": torch.ones(1)}, ValueError, r"norm_weight must be \[16\]"),
        ({"k_norm_weight": torch.ones(8)}, ValueError, r"k_norm_weight must be \[16\] or \[4\], got \[8\]"),
    ],
)
def test_bad_input_names_its_argument(change, error, says):
    tensors, settings = make(dtype=torch.float32)
    with pytest.raises(error, match=says):
        aadkern.attention_pool(**{**tensors, **settings, **change})


def test_weights_may_be_wider_than_low_precision_tokens_only():
    tensors, settings = make(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"w_k must have x's dtype torch\.bfloat16 or float32, got torch\.float16"):
        pool(tensors | {"w_k": tensors["w_k"].half()}, settings)
    tensors, settings = make(dtype=torch.float64)
    with pytest.raises(TypeError, match=r"w_k must have x's dtype torch\.float64, got torch\.float32"):
        pool(tensors | {"w_k": tensors["w_k"].float()}, settings)


def test_the_reference_is_exact_in_low_precision():
    tensors, settings = make(dtype=torch.bfloat16)
    double = {name: x.double() for name, x in tensors.items()}
    expected = reference.attention_pool(**DEFAULTS | double | settings)
    torch.testing.assert_close(pool(tensors, settings, "reference"), expected.bfloat16(), rtol=2**-7, atol=1e-6)
