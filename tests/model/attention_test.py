"""GPSA: compared with the paper's equations, in its limits, and at initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from convit_jax import GPSA, SelfAttention
from convit_jax.model.attention import POSITIONAL_FORMS

GRIDS = [(5, 5), (3, 7), (7, 2), (1, 6)]


def apply(module, params, x, grid=None, **options):
    """Calls module.apply in one compilation."""
    rngs = options.pop("rngs", None)
    function = functools.partial(module.apply, grid=grid, **options)
    return jax.jit(function)({"params": params}, x, rngs=rngs)


def init(module, x, grid=None, seed=0):
    return jax.jit(lambda key: module.init(key, x, grid)["params"])(jax.random.key(seed))


def random_params(module: GPSA, width: int, grid, seed: int = 0, biased: bool = False):
    """Parameters at which every part of GPSA matters (`reference.randomise` says why)."""
    x = jnp.zeros((1, grid[0] * grid[1], width))
    shapes = jax.eval_shape(functools.partial(module.init, grid=grid), jax.random.key(0), x)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: rng.normal(0, 1.5 / p.shape[0] ** 0.5, p.shape), shapes["params"]
    )
    params["gate"] = rng.normal(size=params["gate"].shape)
    params["pos_proj"]["kernel"] = rng.normal(0, 0.3, params["pos_proj"]["kernel"].shape)
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)


@pytest.mark.parametrize("form", POSITIONAL_FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_heads", [1, 4, 5, 9, 16])
def test_equals_the_definition(form, grid, num_heads):
    width = 4 * num_heads
    module = GPSA(num_heads, positional=form, qkv_bias=num_heads == 4)
    params = random_params(module, width, grid)
    x = jax.random.normal(jax.random.key(1), (2, grid[0] * grid[1], width))
    out, maps = apply(module, params, x, grid, return_attention=True)
    expected = reference.gpsa(params, x, grid, num_heads)
    np.testing.assert_allclose(out, expected["out"], atol=5e-6 * np.abs(expected["out"]).max())
    assert maps.keys() == {"content", "positional", "gate", "blended"}
    for name, value in maps.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-6, err_msg=name)
    np.testing.assert_allclose(maps["blended"].sum(-1), 1, atol=2e-6)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_gradients_of_the_forms_agree(grid):
    x = jax.random.normal(jax.random.key(1), (2, grid[0] * grid[1], 16))
    params = random_params(GPSA(4), 16, grid)

    def loss(params, x, form):
        return jnp.sum(jnp.sin(apply(GPSA(4, positional=form), params, x, grid)))

    grad = jax.jit(jax.grad(loss, (0, 1)), static_argnames="form")
    blend, contract = (grad(params, x, form=form) for form in POSITIONAL_FORMS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), blend, contract)
    assert np.abs(blend[0]["pos_proj"]["kernel"]).max() > 0.01
    # The softmax cancels the bias: exactly zero here, rounding noise in the reference.
    assert not np.any(blend[0]["pos_proj"]["bias"])


@pytest.mark.parametrize("form", POSITIONAL_FORMS)
def test_gate_at_infinity_leaves_one_part(form):
    grid, heads = (3, 4), 4
    module = GPSA(heads, positional=form)
    params = random_params(module, 16, grid)
    x = jax.random.normal(jax.random.key(1), (2, 12, 16))
    for gate, part in ((jnp.inf, "positional"), (-jnp.inf, "content")):
        params["gate"] = jnp.full(heads, gate)
        out, maps = apply(module, params, x, grid, return_attention=True)
        np.testing.assert_array_equal(
            maps["blended"], np.broadcast_to(maps[part], (2, heads, 12, 12))
        )
        expected = reference.gpsa({**params, "gate": np.full(heads, gate)}, x, grid, heads)
        np.testing.assert_allclose(out, expected["out"], atol=1e-5)


@pytest.mark.parametrize("form", POSITIONAL_FORMS)
@pytest.mark.parametrize(("num_heads", "kernel_size"), [(1, 1), (9, 3), (25, 5)])
def test_strong_locality_is_a_convolution(form, num_heads, kernel_size):
    """Section 3 of the paper: k x k heads that each look at one patch make a k x k convolution."""
    grid, head = (9, 8), 3
    width = head * num_heads
    module = GPSA(num_heads, locality_strength=100.0, positional=form)
    x = jax.random.normal(jax.random.key(1), (2, 72, width))
    params = init(module, x, grid)
    positions = params["pos_proj"]
    params = random_params(module, width, grid) | {"pos_proj": positions}
    params["gate"] = jnp.full(num_heads, jnp.inf)
    out = apply(module, params, x, grid)

    # Head h1 + k h2 looks h1 - centre rows down and h2 - centre columns to the right.
    v = params["v"]["kernel"].reshape(width, num_heads, head)
    proj = params["proj"]["kernel"].reshape(num_heads, head, width)
    kernel = jnp.einsum("ihk,hko->hio", v, proj).reshape(kernel_size, kernel_size, width, width)
    conv = jax.lax.conv_general_dilated(
        x.reshape(2, *grid, width),
        kernel.swapaxes(0, 1),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    conv += params["proj"]["bias"]
    edge = kernel_size // 2
    interior = np.s_[:, edge : grid[0] - edge, edge : grid[1] - edge]
    out = out.reshape(2, *grid, width)
    np.testing.assert_allclose(out[interior], conv[interior], atol=2e-5 * np.abs(conv).max())


@pytest.mark.parametrize("size", [14, 64])
def test_bfloat16_leaves_positions_and_gates_exact(size):
    """Squared distances reach 338 on a 14 x 14 grid and 7,938 on 64 x 64: not exact in bfloat16."""
    grid = (size, size)
    params = random_params(GPSA(1), 4, grid)
    params["pos_proj"]["kernel"] = jnp.float32([[0.7], [-0.4], [-0.05]])
    x = jax.random.normal(jax.random.key(1), (1, size * size, 4))
    low, high = (
        apply(GPSA(1, dtype=dtype), params, x, grid, return_attention=True)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert low[0].dtype == jnp.bfloat16
    for name in ("positional", "gate"):
        assert low[1][name].dtype == jnp.float32
        np.testing.assert_array_equal(low[1][name], high[1][name])
    for name in ("content", "blended"):  # their inputs are rounded, the softmax is not
        assert low[1][name].dtype == jnp.float32
        np.testing.assert_allclose(low[1][name].sum(-1), 1, atol=1e-5)
    queries = np.s_[:: size * 3 + 5]
    scores = reference.relative_positions(grid, queries) @ [0.7, -0.4, -0.05]
    expected = reference.softmax(scores)
    np.testing.assert_allclose(low[1]["positional"][0, queries], expected, atol=2e-6)


def test_no_map_is_made_unless_asked_for():
    """Without an (N, N) content part, "contract" makes no (N, N) array. No form makes (N, N, 3)."""
    grid, size = (6, 8), 48
    x = jnp.zeros((2, size, 16))

    def shapes(module, return_attention):
        params = init(module, x, grid)
        function = functools.partial(apply, module, grid=grid, return_attention=return_attention)
        jaxpr = jax.make_jaxpr(function)(params, x)
        return {var.aval.shape for equation in _equations(jaxpr.jaxpr) for var in equation.outvars}

    contract = GPSA(4, positional="contract", attention=lambda q, k, v, scale: v)
    assert not [s for s in shapes(contract, False) if s[-2:] == (size, size)]
    assert [s for s in shapes(contract, True) if s[-2:] == (size, size)]
    blend = shapes(GPSA(4, positional="blend"), False)
    assert (4, size, size) in blend  # the positional part, once for all images
    assert not [s for s in blend if len(s) > 2 and s[-1] == 3]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_a_function_can_be_given_such_as_that_of_jax():
    grid = (4, 5)
    x = jax.random.normal(jax.random.key(1), (2, 20, 16))
    gpsa, plain = GPSA(4, positional="contract"), SelfAttention(4, qkv_bias=True)
    for module in (gpsa, plain):
        params = init(module, x, grid)
        own = apply(module, params, x, grid)
        for function, same in (
            (jax.nn.dot_product_attention, True),
            (lambda q, k, v, *, scale: 0 * v, False),
        ):
            out = apply(module.clone(attention=function), params, x, grid)
            assert np.allclose(out, own, atol=1e-6) == same


@pytest.mark.parametrize("strength", [1.0, 2.5])
@pytest.mark.parametrize("num_heads", [4, 5, 9, 16])
def test_local_initialisation(num_heads, strength):
    """The values are those of the original's local_init, also for heads beyond k^2."""
    width = 2 * num_heads
    x = jnp.zeros((1, 16, width))
    module = GPSA(num_heads, locality_strength=strength)
    params = init(module, x, (4, 4), seed=3)
    k = int(num_heads**0.5)
    centre = (k - 1) / 2 if k % 2 == 0 else k // 2
    kernel = np.asarray(params["pos_proj"]["kernel"])
    for h1 in range(k):
        for h2 in range(k):
            expected = strength * np.array([2 * (h2 - centre), 2 * (h1 - centre), -1])
            np.testing.assert_allclose(kernel[:, h1 + k * h2], expected)
    np.testing.assert_array_equal(params["v"]["kernel"], np.eye(width))
    np.testing.assert_array_equal(params["gate"], 1)

    generic = init(module.clone(use_local_init=False), x, (4, 4), seed=3)
    generic_kernel = np.asarray(generic["pos_proj"]["kernel"])
    assert 0 < np.abs(generic_kernel).max() < 0.1
    np.testing.assert_allclose(kernel[:, k * k :], strength * generic_kernel[:, k * k :])
    assert np.abs(generic["v"]["kernel"]).max() < 0.15


def test_dropout_acts_on_the_blended_map_and_the_output():
    grid, x = (3, 4), jax.random.normal(jax.random.key(1), (2, 12, 16))
    rngs = {"dropout": jax.random.key(2)}
    for module in (
        GPSA(4, attn_dropout=0.5),
        SelfAttention(4, attn_dropout=0.5),
        GPSA(4, dropout=0.5),
        SelfAttention(4, dropout=0.5),
    ):
        params = init(module, x, grid)
        still = apply(module, params, x, grid)
        moved = apply(module, params, x, grid, train=True, rngs=rngs)
        assert not np.allclose(still, moved, atol=1e-3)
        zeros = np.mean(moved == 0)
        assert 0.4 < zeros < 0.6 if module.dropout else zeros == 0
    # The mean over many draws is the map itself, because dropout scales the entries it keeps.
    module = GPSA(4, attn_dropout=0.3)
    params = init(module, x, grid)
    keys = jax.random.split(jax.random.key(5), 2000)
    draw = jax.vmap(lambda k: apply(module, params, x, grid, train=True, rngs={"dropout": k}))
    still = apply(module, params, x, grid)
    np.testing.assert_allclose(draw(keys).mean(0), still, atol=0.01)
    # Both forms draw the same dropout of the output.
    blend, contract = (
        apply(GPSA(4, dropout=0.5, positional=form), params, x, grid, train=True, rngs=rngs)
        for form in POSITIONAL_FORMS
    )
    np.testing.assert_allclose(blend, contract, atol=1e-6)


def test_bad_options_are_refused():
    x = jnp.zeros((1, 12, 16))
    cases = [
        (
            lambda: GPSA(4, positional="dense"),
            r"expected auto or one of \('blend', 'contract'\), got 'dense'",
        ),
        (
            lambda: GPSA(4, positional="contract", attn_dropout=0.1),
            "expected positional auto or blend, got 'contract' with attn_dropout=0.1",
        ),
        (
            lambda: GPSA(4, positional="blend", attention="chunked"),
            "attention: expected auto, xla or fused with positional='blend', got 'chunked'",
        ),
        (
            lambda: GPSA(4, attention=max, attn_dropout=0.1),
            "attention: expected auto or xla with attn_dropout=0.1, got <built-in",
        ),
        (
            lambda: SelfAttention(4, attention="cudnn", attn_dropout=0.1),
            "expected that or 'auto' with attn_dropout=0.1, got 'cudnn'",
        ),
        (lambda: SelfAttention(4, attention="flash"), "attention: expected auto, one of .*'flash'"),
        (
            lambda: GPSA(3).init(jax.random.key(0), x, (3, 4)),
            "expected a divisor of 16, got 3",
        ),
        (
            lambda: SelfAttention(0).init(jax.random.key(0), x),
            "expected a divisor of 16, got 0",
        ),
        (
            lambda: GPSA(4).init(jax.random.key(0), x, (3, 5)),
            r"grid \(3, 5\) has 15 patches: expected 12",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
