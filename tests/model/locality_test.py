"""Non-locality: closed forms, a slow direct implementation, and timm's maps."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from convit_jax.model import locality

IMAGES = np.random.default_rng(1).standard_normal((2, 12, 20, 3), np.float32)
GRID = (3, 5)  # of these images


def direct(attention, grid):
    """Equation 8 for one map (N, N), a pair of patches at a time."""
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    total = 0.0
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            total += attention[i, j] * math.dist(query, key)
    return total / len(places)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_known_maps_have_their_closed_form(grid):
    """Identity, steps of one patch, and a uniform map."""
    rows, columns = grid
    size = rows * columns
    # One step to the right along each row, and from its last patch to the left or to its first.
    turning, wrapped = np.eye(columns, k=1), np.roll(np.eye(columns), 1, axis=1)
    turning[-1, -2] = 1
    turning, wrapped = (np.kron(np.eye(rows), line) for line in (turning, wrapped))
    known = {0.0: np.eye(size), 1.0: turning, 2 * (columns - 1) / columns: wrapped}
    for expected, attention in known.items():
        assert locality.reach(jnp.asarray(attention), grid) == pytest.approx(expected, abs=1e-6)
    uniform = np.full((size, size), 1 / size)
    if rows == 1:  # the mean of |i - j| over a line of n is (n^2 - 1) / 3n
        mean = (columns**2 - 1) / (3 * columns)
    else:
        mean = np.mean([math.dist(a, b) for a in np.ndindex(grid) for b in np.ndindex(grid)])
    assert locality.reach(jnp.asarray(uniform), grid) == pytest.approx(mean, rel=1e-6)
    # A class token is left out, however much of the attention it has.
    with_token = np.pad(0.1 * turning, ((1, 0), (1, 0)), constant_values=0.9)
    assert locality.reach(jnp.asarray(with_token), grid) == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(ValueError, match=f"expected {size} queries and keys, or one more"):
        locality.reach(jnp.eye(size + 2), grid)


@pytest.mark.parametrize("family", ["convit", "deit"])
def test_measures_are_those_of_timms_maps(family):
    """Of a rectangle, with each layer's true input; the sums are those of the direct loop."""
    _, torch = reference.import_timm()
    theirs, model, variables = reference.timm_pair(family)
    found = jax.jit(functools.partial(locality.image_nonlocality, model))(variables, IMAGES)
    queries = [(1, 2), (0, 4)]
    rows = jax.jit(functools.partial(locality.query_attention, model, queries=queries))
    rows = rows(variables, IMAGES)
    expected, _ = reference.timm_maps(theirs, IMAGES, torch)
    for layer, attention in enumerate(expected):
        attention = attention.detach().numpy().astype(np.float64)
        if attention.shape[-1] == 16:
            attention = attention[:, :, 1:, 1:]
            attention = attention / attention.sum(axis=-1, keepdims=True)
        reaches = [[direct(head, GRID) for head in image] for image in attention]
        np.testing.assert_allclose(found["blended"][layer], reaches, rtol=1e-5)
        seen = attention[:, :, [7, 4]].reshape(2, 4, 2, *GRID)
        np.testing.assert_allclose(rows["blended"][layer], seen, atol=3e-6)

    assert found.keys() == rows.keys()
    gates = locality.gates(variables["params"])
    if family == "deit":
        assert gates.shape == (0, 0)
        assert found.keys() == {"blended", "content"}
        return
    share = np.asarray(gates)[:, None]  # equation 8 is linear in the two parts of equation 7
    parts = (1 - share) * found["content"][:2] + share * found["positional"][:, None]
    np.testing.assert_allclose(found["blended"][:2], parts, rtol=1e-5)
    expected = [torch.sigmoid(block.attn.gating_param) for block in theirs.blocks[:2]]
    np.testing.assert_allclose(gates, torch.stack(expected).detach().numpy(), atol=1e-6)


def test_a_query_outside_of_the_grid_is_refused():
    _, model, variables = reference.timm_pair("convit")
    with pytest.raises(ValueError, match="a row of 0 to 2 and a column of 0 to 4, got 3,0"):
        locality.query_attention(model, variables, IMAGES, [(3, 0)])
