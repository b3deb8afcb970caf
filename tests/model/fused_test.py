"""The fused TPU kernel, interpreted on a CPU. tests/model/sdpa_test.py has it beside the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convit_jax import GPSA, ConViT, SelfAttention, create_model
from convit_jax.model import fused
from convit_jax.model.attention import choose_forms
from convit_jax.model.fused import Fused
from convit_jax.model.positional import positional_factors, positional_map
from convit_jax.parallel import sharding

INTERPRETED = Fused(interpret=True)


def draw(*shapes, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def plain(qkv, heads, queries=None, mix=lambda content: content):
    """Softmax attention of (B, N, 3 D), written out."""
    batch, tokens, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, heads, -1), 2, 0)
    scores = jnp.einsum("bnhk,bmhk->bhnm", q[:, :queries], k, precision="highest")
    content = mix(jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1))
    out = jnp.einsum("bhnm,bmhk->bnhk", content, v, precision="highest")
    return out.reshape(batch, -1, width // 3)


def written_out(qk, v, weights, gates, grid):
    """GPSA, written out."""
    share = jax.nn.sigmoid(gates)[:, None, None]
    positional = positional_map(*positional_factors(weights, grid))
    qkv = jnp.concatenate([qk, v], axis=-1)
    return plain(qkv, len(gates), mix=lambda content: (1 - share) * content + share * positional)


def assert_equal(kernel, definition, inputs, tolerance=3e-6):
    """Asserts that values and all gradients agree, relative to the largest number of each."""

    def value_and_grads(function):
        def of(*inputs):
            out = function(*inputs).astype(jnp.float32)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.value_and_grad(of, tuple(range(len(inputs))), has_aux=True))(*inputs)

    (_, out), grads = value_and_grads(kernel)
    (_, expected), slopes = value_and_grads(definition)
    for found, value in zip((out, *grads), (expected, *slopes), strict=True):
        found, value = np.float32(found), np.float32(value)
        assert np.abs(found - value).max() <= tolerance * np.abs(value).max()


def assert_case(kernel, heads, width, grid, queries=None, dtype=jnp.float32, tolerance=3e-6):
    """Compares GPSA over a grid, and plain attention with a class token in front."""
    tokens, channels, scale = grid[0] * grid[1], heads * width, width**-0.5
    shapes = (1, tokens, 2 * channels), (1, tokens, channels), (3, heads), (heads,)
    *inputs, weights, gates = (jnp.asarray(x, jnp.float32) for x in draw(*shapes))
    inputs = [*(x.astype(dtype) for x in inputs), 0.3 * weights, gates]
    assert_equal(
        functools.partial(kernel.gpsa, grid=grid, scale=scale),
        lambda *inputs: written_out(*(x.astype(jnp.float32) for x in inputs), grid),
        inputs,
        tolerance,
    )
    assert_equal(
        functools.partial(kernel.self_attention, heads=heads, scale=scale, queries=queries),
        lambda qkv: plain(qkv.astype(jnp.float32), heads, queries),
        [jnp.asarray(draw((1, tokens + 1, 3 * channels))[0], dtype)],
        tolerance,
    )


def test_heads_are_computed_in_groups_if_not_all_fit():
    kernel = Fused(interpret=True, memory=0.35)
    for case in ((15, True), (16, False)):
        assert fused.group_of(4, 64, *case, jnp.float32, memory=kernel.memory) == 2
    assert_case(kernel, 4, 64, (3, 5))


@pytest.mark.slow
def test_any_number_of_tokens_heads_and_widths():
    """Each case has N patches and N + 1 tokens, so both sides of the registers' 8 and 128."""
    cases = [(1, 48, (1, 1)), (4, 64, (1, 5)), (9, 48, (7, 9)), (16, 48, (2, 4)), (1, 64, (14, 14))]
    cases += [(1, 48, (1, tokens)) for tokens in (7, 127, 255)]
    for heads, width, grid in cases:
        # The gradient of a gate is a sum whose terms cancel.
        assert_case(INTERPRETED, heads, width, grid, tolerance=1e-5)
    assert_case(INTERPRETED, 4, 48, (7, 9), queries=1, dtype=jnp.bfloat16, tolerance=2e-2)


def test_a_batch_is_split_over_a_mesh_and_nothing_is_gathered():
    """Only the gradients of the (3, H) weights and of the gates are sent."""
    mesh, grid, heads = sharding.make_mesh(fsdp=2), (1, 3), 4
    over, whole = sharding.over_batch(mesh), sharding.replicated(mesh)
    inputs = [jnp.float32(x) for x in draw((8, 3, 64), (8, 3, 32), (3, heads), (heads,))]
    inputs = jax.device_put(inputs, [over, over, whole, whole])

    def loss(kernel, *inputs):
        return jnp.sin(kernel.gpsa(*inputs, grid=grid, scale=0.3)).sum()

    kernels = Fused(sharding.split_batch(mesh), interpret=True), INTERPRETED
    split, alone = (
        jax.jit(jax.grad(functools.partial(loss, kernel), (0, 1, 2, 3))) for kernel in kernels
    )
    text = split.lower(*inputs).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    expected = alone(*jax.device_put(inputs, jax.devices()[0]))
    for found, value in zip(split(*inputs), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)


def test_it_is_chosen_on_a_tpu_where_it_fits():
    def chosen(tokens, attention="auto", positional="auto", dropout=0.0, **options):
        options = {"heads": 16, "width": 48, "backend": "tpu", "split": True} | options
        return choose_forms(attention, positional, tokens, dropout, **options)

    assert chosen(196, dtype=jnp.bfloat16) == ("fused", "blend")
    assert chosen(196, positional="blend") == ("fused", "blend")
    assert chosen(196, positional="contract") == ("xla", "contract")
    assert chosen(196, dropout=0.1) == ("xla", "blend")
    assert chosen(196, "xla") == ("xla", "blend")
    assert chosen(196, INTERPRETED) == (INTERPRETED, "blend")
    assert chosen(196, dtype=jnp.float16) == ("xla", "blend")
    assert chosen(900) == ("xla", "blend")
    assert chosen(196, backend="cpu") == ("xla", "contract")
    assert chosen(196, split=False) == ("xla", "blend")  # this process has 8 devices
    symbolic = jax.export.symbolic_shape("b")[0]
    assert chosen(196, batch=symbolic) == ("xla", "blend")
    variants = [create_model(name) for name in ("convit_tiny", "convit_small", "convit_base_plus")]
    for model in variants:
        width = model.embed_dim // model.num_heads
        assert fused.fits(model.num_heads, width, 256, jnp.bfloat16)


def test_it_says_what_it_needs():
    x = jnp.zeros((1, 6, 8))
    module = GPSA(2, attention="fused")
    variables = jax.eval_shape(lambda key: module.init(key, x, (2, 3)), jax.random.key(0))
    with pytest.raises(ValueError, match="attention='fused' needs a TPU, got cpu: expected auto"):
        jax.eval_shape(lambda variables: module.apply(variables, x, (2, 3)), variables)
    with pytest.raises(ValueError, match=r"16 MiB of VMEM .* got 2000 tokens, 1 heads of 48"):
        INTERPRETED.self_attention(jnp.zeros((1, 2000, 144)), heads=1, scale=1.0)
    with pytest.raises(ValueError, match=r"bfloat16 or float32, got .* float16"):
        INTERPRETED.self_attention(jnp.zeros((1, 4, 24), jnp.float16), heads=1, scale=1.0)
    with pytest.raises(ValueError, match="expected auto or blend with attention='fused'"):
        GPSA(2, attention="fused", positional="contract")
    for make in (GPSA, SelfAttention):
        with pytest.raises(ValueError, match=r"attn_dropout=0\.1, got 'fused'"):
            make(2, attention="fused", attn_dropout=0.1)
    assert ConViT(attention="fused", positional="blend").attention == "fused"
