"""How a model computes attention and linear layers on the devices of a run.

The model alone cannot know this: its module is the same for any backend and any mesh.
"""

import dataclasses
import math
from typing import TypeVar

import flax.linen as nn
import jax
from jax.sharding import Mesh

from convit_jax.model import fused
from convit_jax.model.attention import choose_forms
from convit_jax.model.fused import Fused
from convit_jax.model.linear import choose_flat
from convit_jax.model.network import ConViT
from convit_jax.parallel import sharding

Model = TypeVar("Model", bound=nn.Module)


def settle(model: ConViT, backend: str | None = None) -> ConViT:
    """Returns the model with the forms that are open ("auto", None) chosen for the backend.

    The fused kernel must then be split by `over_mesh` if there are several devices.

    Args:
      model: the model.
      backend: "cpu", "gpu" or "tpu", where the model will run; None is JAX's default.

    Raises:
      ValueError: if the model asks for the fused kernel on another backend than a TPU.
    """
    backend = backend or jax.default_backend()
    attention, positional = choose_forms(
        model.attention, model.positional, math.prod(model.grid), model.attn_dropout,
        dtype=model.dtype, width=model.embed_dim // model.num_heads, heads=model.num_heads,
        backend=backend, split=True,
    )  # fmt: skip
    if attention == "fused":
        fused.check_backend(backend)
        attention = Fused()
    flat = choose_flat(model.flat_tokens, backend)
    return model.clone(attention=attention, positional=positional, flat_tokens=flat)


def over_mesh(model: Model, mesh: Mesh) -> Model:
    """Returns the model with its fused kernel, if it has one, split over the devices of a mesh.

    The kernel takes as many heads at a time as the memory of these devices holds.

    Raises:
      ValueError: if the model asks for the fused kernel by name and the devices are no TPUs.
    """
    kernel = getattr(model, "attention", None)
    if kernel == "fused":
        fused.check_backend(mesh.devices.flat[0].platform)
        kernel = Fused()
    if not isinstance(kernel, Fused):
        return model
    memory = fused.memory_of(mesh.devices.flat[0])
    kernel = dataclasses.replace(kernel, split=sharding.split_batch(mesh), memory=memory)
    return model.clone(attention=kernel)
