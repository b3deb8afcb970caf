"""What a step holds between its passes: what is kept, what is repeated, and in which order."""

import jax
from jax.extend.core import Var
import jax.numpy as jnp

from convit_jax import ConViT
from convit_jax.model.fused import Fused
from convit_jax.plan import arithmetic

# 16 patches, 2 GPSA blocks, a plain one, and the last, which computes the class token alone.
SIZES = {"image_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 8, "num_heads": 2}
MODEL = ConViT(**SIZES, depth=4, local_up_to_layer=2)
BATCH, WIDTH, TOKENS = 3, 8, 2 * 16 + 17 + 1
IMAGES = jnp.zeros((BATCH, 16, 16, 3))


def gradients(model, train=False):
    """The program of the gradients of a model, and the shapes of its parameters."""
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    loss = jax.grad(lambda variables: model.apply(variables, IMAGES, train=train).sum())
    return jax.make_jaxpr(loss)(variables), variables["params"]


def test_mlp_repeats_the_hidden_layers_and_block_the_projections_too():
    model = MODEL.clone(attention="xla", positional="blend")
    flops = {
        remat: arithmetic.of_jaxpr(gradients(model.clone(remat=remat))[0]).flops
        for remat in ("dots", "mlp", "block")
    }
    product = 2 * BATCH * TOKENS * WIDTH**2  # a product with a (D, D) matrix in all blocks
    assert flops["mlp"] - flops["dots"] == 4 * product
    # Queries, keys and values, in the last block of all tokens, and the projection of the output.
    projections = 3 * (product + 2 * BATCH * 16 * WIDTH**2) + product
    assert flops["block"] - flops["mlp"] > projections


def test_the_kernels_result_is_kept_without_a_copy():
    """`reduce_precision` of what a kernel made would be a copy on TPU."""
    program, _ = gradients(MODEL.clone(attention=Fused(interpret=True)))
    layers = next(e for e in program.jaxpr.eqns if e.primitive.name == "scan").params["jaxpr"]
    made, readers = set(), []
    for equation in layers.eqns:
        name = equation.primitive.name
        reads = any(isinstance(x, Var) and x in made for x in equation.invars)
        if name == "pallas_call" or (reads and name in ("reshape", "name")):
            made.update(equation.outvars)
        elif reads:
            readers.append(name)
    assert len(readers) == 1  # the projection
    assert readers[0] in ("jit", "pjit")


def test_gradients_of_the_last_blocks_are_finished_before_those_of_the_blocks_before():
    """The barrier returns the gradients of their parameters together with that of their input."""

    def barriers(train):
        program, params = gradients(MODEL, train)
        return params, [e for e in program.jaxpr.eqns if e.primitive.name == "optimization_barrier"]

    assert barriers(train=False)[1] == []
    params, (*_, backward) = barriers(train=True)
    shapes = [x.shape for x in jax.tree.leaves([params["blocks"], params["last_block"]])]
    assert [x.aval.shape for x in backward.outvars] == [*shapes, (BATCH, 17, WIDTH)]
