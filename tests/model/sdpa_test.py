"""Every way to compute attention: values, gradients, memory, and which one is chosen."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from convit_jax import GPSA, SelfAttention
from convit_jax.model import remat, sdpa
from convit_jax.model.attention import choose_forms
from convit_jax.model.fused import Fused

# Chunks of 8 and 5 queries make several chunks, the last one padded.
CHUNKS = {f"chunks of {n}": functools.partial(sdpa.chunked_attention, chunk=n) for n in (8, 5)}
FUSED = Fused(interpret=True)
FORMS = {
    "blend": {"positional": "blend"},
    "contract, xla": {"positional": "contract", "attention": "xla"},
    "contract, chunked": {"positional": "contract", "attention": "chunked"},
    **{f"contract, {name}": {"attention": function} for name, function in CHUNKS.items()},
    "fused": {"attention": FUSED},
}


def random_params(module, x, grid=None, seed=0):
    """Parameters at which every part of attention matters (`reference.randomise` says why)."""
    shapes = jax.eval_shape(functools.partial(module.init, grid=grid), jax.random.key(0), x)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names = [part.key for part in path]
        std = 0.3 if "pos_proj" in names else 1 if "gate" in names else 1.5 / leaf.shape[0] ** 0.5
        return jnp.asarray(rng.normal(0, std, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def value_and_grads(module, params, x, grid, target, **options):
    """The loss <sin(out), target> and its gradients with respect to the parameters and x."""

    def loss(params, x):
        out = module.apply({"params": params}, x, grid=grid, **options)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)) * target)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)


def slopes(definition, params, x, target, seed=0):
    """Returns (direction, slope of the loss) for a random direction of each array, in float64."""
    loss = lambda params, x: np.sum(np.sin(definition(params, x)) * target)  # noqa: E731
    leaves, treedef = jax.tree.flatten((params, x))
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    rng, step = np.random.default_rng(seed), 1e-5
    for i, leaf in enumerate(leaves):
        direction = rng.normal(size=leaf.shape)
        ends = []
        for sign in (1, -1):
            moved = [*leaves]
            moved[i] = leaf + sign * step * direction
            ends.append(loss(*jax.tree.unflatten(treedef, moved)))
        yield direction, (ends[0] - ends[1]) / (2 * step)


def assert_is(definition, module, params, x, grid, tolerance, **options):
    """Asserts that a module's value and gradients are those of a definition in float64.

    Each gradient is compared along one random direction. `tolerance` is relative to the largest
    output, and to the length of a gradient.
    """
    out = jax.jit(functools.partial(module.apply, grid=grid, **options))({"params": params}, x)
    expected = definition(params, x)
    error = np.abs(np.asarray(out, np.float64) - expected).max()
    assert error < tolerance * np.abs(expected).max()
    target = np.random.default_rng(1).normal(size=expected.shape)
    _, grads = value_and_grads(module, params, x, grid, target, **options)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    for name, grad, (direction, slope) in zip(
        names, jax.tree.leaves(grads), slopes(definition, params, x, target), strict=True
    ):
        if "pos_proj" in name and "bias" in name:
            assert not np.any(grad)  # the softmax cancels it
            continue
        found = np.sum(np.asarray(grad, np.float64) * direction)
        assert abs(found - slope) < 5 * tolerance * np.linalg.norm(grad), name


@pytest.mark.parametrize(
    # tests/model/fused_test.py has the kernel with heads of 48
    ("form", "head"), [(f, h) for f in FORMS for h in (48, 64) if (f, h) != ("fused", 48)]
)  # fmt: skip
@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
def test_gpsa_equals_the_definition(form, head, grid):
    heads, size = 2, grid[0] * grid[1]
    module = GPSA(heads, **FORMS[form])
    x = jax.random.normal(jax.random.key(1), (2, size, heads * head))
    params = random_params(module, x, grid)
    assert_is(
        lambda params, x: reference.gpsa(params, x, grid, heads)["out"],
        module, params, x, grid, tolerance=3e-6,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_gpsa_in_bfloat16(form):
    """bfloat16 has 8 bits of mantissa: each of a handful of roundings costs 2^-8."""
    grid, heads = (3, 7), 2
    module = GPSA(heads, dtype=jnp.bfloat16, **FORMS[form])
    x = jax.random.normal(jax.random.key(1), (2, 21, 96)).astype(jnp.bfloat16).astype(jnp.float32)
    params = random_params(module, x, grid)
    assert_is(
        lambda params, x: reference.gpsa(params, x, grid, heads)["out"],
        module, params, x, grid, tolerance=2e-2,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [20, 21])  # a class token in front or none
@pytest.mark.parametrize("attention", ["xla", "chunked", *CHUNKS, "fused"])
def test_plain_attention_equals_the_definition(attention, tokens):
    heads = 2
    attention = FUSED if attention == "fused" else CHUNKS.get(attention, attention)
    module = SelfAttention(heads, qkv_bias=True, attention=attention)
    x = jax.random.normal(jax.random.key(1), (2, tokens, 96))
    params = random_params(module, x)
    assert_is(
        lambda params, x: reference.self_attention(params, x, heads),
        module, params, x, None, tolerance=3e-6,
    )  # fmt: skip


def never(*args, **kwargs):
    raise AssertionError("few queries are not for other implementations")


@pytest.mark.parametrize("attention", [never, FUSED])
@pytest.mark.parametrize("queries", [1, 5])
def test_attention_from_the_first_tokens_alone(queries, attention):
    module = SelfAttention(2, attention=attention, queries=queries)
    x = jax.random.normal(jax.random.key(1), (2, 21, 96))
    params = random_params(module, x)
    assert_is(
        lambda params, x: reference.self_attention(params, x, 2)[:, :queries],
        module, params, x, None, tolerance=3e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="queries: expected None or 1 or more, got 0"):
        SelfAttention(2, queries=0)


def test_with_its_result_kept_the_backward_pass_averages_no_values_again():
    """Seven products: two forward, the scores again, four gradients. An eighth would repeat one."""

    def products(policy):
        attend = functools.partial(sdpa.xla_attention, scale=1.0)
        loss = jax.checkpoint(lambda q, k, v: jnp.sin(attend(q, k, v)).sum(), policy=policy)
        x = jnp.zeros((2, 5, 3, 4))
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x)).count("dot_general[")

    assert products(remat.POLICIES["mlp"]) == 7
    assert products(remat.POLICIES["block"]) == 8


def test_dropout_takes_entries_of_the_blended_map():
    """With v = identity the output is the map, so it shows which entries dropout took.

    Each entry is 0 or its own value over 1 - rate. Given the entries that dropout took, value and
    gradients are those of the definition.
    """
    grid, heads, size, rate = (3, 4), 2, 12, 0.4
    module = GPSA(heads, attn_dropout=rate)
    x = jnp.tile(jax.random.normal(jax.random.key(1), (1, size, heads * size)), (2, 1, 1))
    params = random_params(module, x, grid)
    options = {"train": True, "rngs": {"dropout": jax.random.key(2)}}
    shown = params | {
        "v": {"kernel": jnp.tile(jnp.linalg.pinv(x[0]), (1, heads))},
        "proj": {"kernel": jnp.eye(heads * size), "bias": jnp.zeros(heads * size)},
    }
    out = module.apply({"params": shown}, x, grid, **options)
    dropped = np.moveaxis(np.asarray(out).reshape(2, size, heads, size), 2, 1)
    blended = reference.gpsa(shown, x, grid, heads)["blended"]
    kept = np.abs(dropped) > blended / 2
    assert 0.5 < kept.mean() < 0.7
    np.testing.assert_allclose(dropped, kept * blended / (1 - rate), atol=2e-5)
    assert_is(
        lambda params, x: reference.gpsa(params, x, grid, heads, kept / (1 - rate))["out"],
        module, params, x, grid, tolerance=3e-6, **options,
    )  # fmt: skip


def largest_arrays(function, *args):
    """Shapes of all arrays that a compiled program computes."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return {tuple(int(n) for n in shape.split(",")) for shape in shapes}


@pytest.mark.parametrize("backward", [False, True])
def test_chunked_holds_no_map(backward):
    """No array has as many elements as the N x N map of one head; "xla" makes all heads' maps."""
    grid, heads = (40, 48), 2
    size = grid[0] * grid[1]
    x = jnp.zeros((1, size, 8))

    def largest(**options):
        module = GPSA(heads, **options)
        params = jax.eval_shape(functools.partial(module.init, grid=grid), jax.random.key(0), x)

        def out(params, x):
            return module.apply(params, x, grid).sum()

        arrays = largest_arrays(jax.grad(out) if backward else out, params, x)
        return max(int(np.prod(shape)) for shape in arrays)

    assert largest(attention="chunked") < size**2
    assert largest() < size**2  # which is what "auto" takes at this size
    assert largest(attention="xla") >= heads * size**2


def test_which_one_is_chosen():
    assert choose_forms("auto", "auto", 196, backend="cpu") == ("xla", "contract")
    assert choose_forms("auto", "auto", 16, backend="cpu") == ("xla", "blend")
    assert choose_forms("auto", "auto", 196, backend="tpu") == ("xla", "blend")
    assert choose_forms("auto", "auto", 196, backend="gpu") == ("xla", "blend")
    assert choose_forms("auto", "auto", 4096, backend="tpu") == ("chunked", "contract")
    assert choose_forms("auto", "auto", 4096, 0.1, backend="cpu") == ("xla", "blend")
    assert choose_forms("auto", "blend", 4096, backend="cpu") == ("xla", "blend")
    assert choose_forms("cudnn", "auto", 196, backend="gpu") == ("cudnn", "contract")


@pytest.mark.parametrize("capability", ["9.0", "8.0", "7.5", "gfx942", None])
def test_cudnn_is_chosen_where_its_kernel_runs(capability, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])

    def chosen(dtype=jnp.bfloat16, attn_dropout=0.0, width=48, positional="auto", backend="gpu"):
        return choose_forms(
            "auto", positional, 196, attn_dropout, dtype=dtype, width=width, backend=backend
        )

    runs = capability in ("9.0", "8.0")
    assert chosen() == (("cudnn", "contract") if runs else ("xla", "blend"))
    assert chosen(jnp.float32) == ("xla", "blend")
    assert chosen(width=136) == ("xla", "blend")
    assert chosen(attn_dropout=0.1) == ("xla", "blend")
    assert chosen(positional="blend") == ("xla", "blend")
    assert chosen(backend="tpu") == ("xla", "blend")


def test_cudnn_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="expected bfloat16 or float16, got float32"):
        sdpa.cudnn_attention(x, x, x, scale=1.0)
    low = x.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, got cpu"):
        sdpa.cudnn_attention(low, low, low, scale=1.0)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the kernel needs a GPU")
@pytest.mark.parametrize("width", [48, 52])  # of a head; 52 is padded
@pytest.mark.parametrize("tokens", [196, 197])
def test_the_cudnn_kernel_equals_xla(tokens, width):
    """bfloat16 has 8 bits of mantissa; the largest value is a few units."""
    q, k, v, cotangent = jax.random.normal(
        jax.random.key(0), (4, 2, tokens, 9, width), jnp.bfloat16
    )

    def value_and_grads(attention, *inputs):
        out, back = jax.vjp(functools.partial(attention, scale=width**-0.5), *inputs)
        return out, *back(cotangent.astype(out.dtype))

    found = jax.jit(functools.partial(value_and_grads, sdpa.cudnn_attention))(q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    for low, high in zip(found, value_and_grads(sdpa.xla_attention, *wide), strict=True):
        np.testing.assert_allclose(np.float32(low), high, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("tokens", [6, 7])
def test_cudnn_pads_heads_and_tokens_to_what_the_kernel_takes(tokens, monkeypatch):
    """The kernel itself needs a GPU, so XLA's attention replaces it here."""
    plain, seen = jax.nn.dot_product_attention, []

    def kernel(q, k, v, *, scale, key_value_seq_lengths, implementation):
        seen.append((q.shape, implementation))
        return plain(q, k, v, scale=scale, key_value_seq_lengths=key_value_seq_lengths)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, tokens, 2, 12), jnp.bfloat16)
    out = sdpa.cudnn_attention(q, k, v, scale=0.3)
    assert seen == [((2, tokens + tokens % 2, 2, 16), "cudnn")]
    expected = sdpa.xla_attention(q, k, v, scale=0.3)
    np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=0.02)
