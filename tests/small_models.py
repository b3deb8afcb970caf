"""Small models for the tests of weights, with random parameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from convit_jax import ConViT

INDEX = "model.safetensors.index.json"
SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 16}
MODEL = ConViT(**SMALL, depth=3, local_up_to_layer=2)
DEIT = ConViT(**SMALL, depth=2, local_up_to_layer=0, cls_pos_embed=True, qkv_bias=True)


def random_params(model=MODEL, seed=0):
    """Parameters of a model, every one drawn from N(0, 1)."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_shape)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f"), shapes["params"])


def equal(a, b):
    """Asserts that two trees hold the same numbers, to the bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write_shards(folder, state_dict):
    """Writes a state dict as two shards, and returns the list of the shards."""
    names, listed = sorted(state_dict), {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: state_dict[name] for name in part}, folder / file)
        listed |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / INDEX).write_text(json.dumps(content, indent=2))
    return folder / INDEX
