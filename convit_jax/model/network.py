"""ConViT and DeiT: patches, transformer blocks and the class token.

The GPSA blocks run under one `nn.scan` and the plain blocks under another, so the parameters
of a group carry a leading layer axis: `params["gpsa_blocks"]["attn"]["gate"]` is (10, H). The last
block is on its own, `params["last_block"]`: where only the class token is wanted it computes no
more, which no other block of a scan can do.

Shapes: B batch, N patches, D width, L layers of a group, R and C rows and columns of patches.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.model.attention import GPSA, Grid, SelfAttention
from convit_jax.model.block import Block
from convit_jax.model.image_size import pair
from convit_jax.model.positional import Linear, linear_init
from convit_jax.model.sdpa import ATTENTION_OUTPUT, AttentionFn

Array = jax.Array

GLOBAL_POOLS = ("token", "avg", "none")

# What the backward pass finds stored, with each way to rematerialise blocks.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    ),
    "block": jax.checkpoint_policies.nothing_saveable,
}
REMAT = ("none", *_REMAT_POLICIES)


def _option(kind: str, default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind})


# The kind of an option, said beside its field; `variants.options_of_kind` reads it.
structure = functools.partial(_option, "structure")  # the parameters' shapes depend on it
changeable = functools.partial(_option, "changeable")  # so, but `weights.adapt` fits them
function = functools.partial(_option, "function")  # the same parameters compute something else
training = functools.partial(_option, "training")  # of initialisation and training alone
computation = functools.partial(_option, "computation")  # the same function, computed otherwise


class ConViT(nn.Module):
    """The ConViT image classifier (d'Ascoli et al. 2021), and DeiT as its baseline.

    Blocks 0 to local_up_to_layer - 1 are GPSA blocks over the patches. The class token is then
    put in front of the patches, and the remaining blocks are plain self-attention.

    Attributes:
      image_size: pixels, one number for a square or (height, width).
      patch_size: pixels, likewise; must divide the image.
      in_channels: of the image.
      num_classes: 0 leaves out the head: the model returns features.
      embed_dim: D, the width.
      depth: number of blocks.
      num_heads: H; must divide D.
      mlp_ratio: hidden width of the MLPs over D.
      qkv_bias: whether query, key and value projections have biases.
      qk_scale: factor of the content scores; None is (D / H) ** -0.5.
      dropout: rate after the position embedding, the attention's output and in the MLPs.
      attn_dropout: rate on the attention maps; needs them written out, see `GPSA`.
      drop_path: rate of stochastic depth of the last block, growing linearly from 0.
      local_up_to_layer: number of GPSA blocks; 0 is a plain ViT, and less than depth.
      locality_strength: the paper's alpha, see `GPSA`.
      use_local_init: see `GPSA`.
      use_pos_embed: whether a learned position embedding is added to the patches. Without it
        the model takes any image that patch_size divides.
      cls_pos_embed: whether the class token has a position embedding too (DeiT); needs
        local_up_to_layer=0.
      global_pool: "token" classifies from the class token, "avg" from the mean of the patches,
        "none" every token, the class token first.
      positional: "auto", "blend" or "contract", see `GPSA`.
      attention: "auto", "xla", "chunked", "cudnn" or a function, see `GPSA` and
        `convit_jax.sdpa`.
      unroll: how many layers a scan's iteration holds; True is all of them. Changes speed and
        memory, not results.
      remat: what the backward pass computes again instead of storing: "none", "dots" (all but
        the results of matrix products with weights, and of attention), "block" (all but the input
        of each block).
      dtype: of the matrix products and the residual stream. Parameters, softmaxes, gates,
        statistics of the norms and logits are float32.

    Raises:
      ValueError: on construction, for any combination of options that has no meaning.
    """

    image_size: int | tuple[int, int] = changeable(224)
    patch_size: int | tuple[int, int] = structure(16)
    in_channels: int = changeable(3)
    num_classes: int = changeable(1000)
    embed_dim: int = structure(192)
    depth: int = structure(12)
    num_heads: int = structure(4)
    mlp_ratio: float = structure(4.0)
    qkv_bias: bool = structure(False)
    qk_scale: float | None = function(None)
    dropout: float = training(0.0)
    attn_dropout: float = training(0.0)
    drop_path: float = training(0.0)
    local_up_to_layer: int = structure(10)
    locality_strength: float = training(1.0)
    use_local_init: bool = training(True)
    use_pos_embed: bool = structure(True)
    cls_pos_embed: bool = structure(False)
    global_pool: str = function("token")
    positional: str = computation("auto")
    attention: str | AttentionFn = computation("auto")
    unroll: int | bool = computation(False)
    remat: str = computation("dots")
    dtype: Any = computation(jnp.float32)

    def __post_init__(self):
        self._check_options()
        super().__post_init__()

    def _check_options(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim={self.embed_dim}, got {self.num_heads}"
            )
        if not 0 <= self.local_up_to_layer < self.depth:
            # At depth or beyond, the class token would never join: the original code then
            # classifies from the first patch without a word.
            raise ValueError(
                f"local_up_to_layer: expected 0 to depth - 1 = {self.depth - 1}, "
                f"got {self.local_up_to_layer}"
            )
        if self.global_pool not in GLOBAL_POOLS:
            raise ValueError(
                f"global_pool: expected one of {GLOBAL_POOLS}, got {self.global_pool!r}"
            )
        if self.cls_pos_embed and (self.local_up_to_layer or not self.use_pos_embed):
            raise ValueError(
                "cls_pos_embed: expected local_up_to_layer=0 and use_pos_embed=True, got "
                f"{self.local_up_to_layer} and {self.use_pos_embed}"
            )
        for name in ("dropout", "attn_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a rate in [0, 1), got {getattr(self, name)}")
        if self.remat not in REMAT:
            raise ValueError(f"remat: expected one of {REMAT}, got {self.remat!r}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes: expected 0 or more, got {self.num_classes}")
        self._grid(self.image_shape[:2])
        # The attention that will be used checks its own options.
        (self._gpsa() if self.local_up_to_layer else self._self_attention())(parent=None)

    def check_classifies(self, who: str) -> None:
        """Raises ValueError unless the model returns one vector of logits an image.

        Args:
          who: names the use or the weights in the message.
        """
        if not self.num_classes or self.global_pool == "none":
            raise ValueError(
                f"{who} needs one vector of logits an image: expected model.num_classes > 0 and "
                f"model.global_pool token or avg, got {self.num_classes} and {self.global_pool}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images the model is made for."""
        return (*pair(self.image_size), self.in_channels)

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches of such an image."""
        return self._grid(self.image_shape[:2])

    def _grid(self, image: tuple[int, int]) -> Grid:
        """Rows and columns of patches of any image (height, width)."""
        patch = pair(self.patch_size)
        if min(patch) < 1 or min(image) < 1 or image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(
                f"image_size: expected a multiple of patch_size={self.patch_size}, got {image}"
            )
        return image[0] // patch[0], image[1] // patch[1]

    def _self_attention(self) -> Callable[..., SelfAttention]:
        return functools.partial(
            SelfAttention,
            num_heads=self.num_heads,
            qkv_bias=self.qkv_bias,
            qk_scale=self.qk_scale,
            attn_dropout=self.attn_dropout,
            dropout=self.dropout,
            attention=self.attention,
            dtype=self.dtype,
        )

    def _gpsa(self) -> Callable[..., GPSA]:
        return functools.partial(
            GPSA,
            **self._self_attention().keywords,
            locality_strength=self.locality_strength,
            use_local_init=self.use_local_init,
            positional=self.positional,
        )

    @nn.compact
    def __call__(
        self, images: Array, train: bool = False, return_attention: bool = False
    ) -> Array | tuple[Array, dict[str, dict[str, Array]]]:
        """Classifies images.

        Args:
          images: (B, height, width, in_channels), normalised, floating point.
          train: whether dropout and stochastic depth are on; needs the rng stream "dropout"
            if one of their rates is not 0.
          return_attention: whether to return every layer's attention maps as well. They come
            from the layers' true inputs, and nothing of them is computed otherwise. The last block
            then computes all tokens: logits differ by rounding, and dropout has other draws.

        Returns:
          Logits (B, num_classes) float32, or features (B, D) with num_classes=0; with
          global_pool="none" (B, 1 + N, ...). With `return_attention`, also
          {"gpsa_blocks": maps of `GPSA`, "blocks": maps of `SelfAttention`}, each with a
          leading layer axis.

        Raises:
          ValueError: if the images do not have the shape the model was made for.
        """
        grid = self._check_images(images)
        x = self._embed_patches(images)
        token = self.param("cls_token", linear_init, (1, 1, self.embed_dim)).astype(self.dtype)

        def prepend_token(x: Array) -> Array:
            return jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape[1:])), x], axis=1)

        if self.cls_pos_embed:
            x = prepend_token(x)
        if self.use_pos_embed:
            x += self.param("pos_embed", linear_init, (1, *x.shape[1:])).astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)

        static = (grid, train, return_attention)
        rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
        rates, plain_rates = np.split(rates, [self.local_up_to_layer])
        maps = {}
        if self.local_up_to_layer:
            blocks = self._scanned_blocks("gpsa_blocks", self._gpsa(), len(rates))
            x, maps["gpsa_blocks"] = blocks(x, rates, *static)
        if not self.cls_pos_embed:
            x = prepend_token(x)
        x, maps["blocks"] = self._plain_blocks(x, plain_rates, *static)

        logits = self._classify(x)
        return (logits, maps) if return_attention else logits

    def _check_images(self, images: Array) -> Grid:
        height, width, channels = self.image_shape
        shape = images.shape
        if len(shape) != 4 or shape[3] != channels:
            raise ValueError(f"images: expected (batch, height, width, {channels}), got {shape}")
        if self.use_pos_embed and shape[1:3] != (height, width):
            raise ValueError(
                f"images: expected {height} x {width} pixels (image_size, which the position "
                f"embedding was made for), got {shape[1]} x {shape[2]}"
            )
        return self._grid(shape[1:3])

    def _embed_patches(self, images: Array) -> Array:
        """(B, height, width, channels) -> (B, N, D), patches in row-major order.

        A convolution whose windows do not overlap, as the matrix product that it is: twice as fast
        on a CPU. Its kernel has a convolution's shape, (height, width, channels, D).
        """
        (height, width), (batch, *_, channels) = pair(self.patch_size), images.shape
        rows, columns = self._grid(images.shape[1:3])
        patches = images.reshape(batch, rows, height, columns, width, channels).swapaxes(2, 3)
        init = _uniform_init(1 / math.sqrt(height * width * channels))
        x = nn.DenseGeneral(
            self.embed_dim,
            axis=(-3, -2, -1),
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            name="patch_embed",
        )(patches)
        return x.reshape(batch, rows * columns, self.embed_dim)

    def _block(self, prevent_cse: bool) -> Callable[..., nn.Module]:
        """What makes a block of an attention, and rematerialises it."""
        block = Block
        if self.remat != "none":
            block = nn.remat(
                block,
                policy=_REMAT_POLICIES[self.remat],
                prevent_cse=prevent_cse,
                static_argnums=(3, 4, 5),
            )
        return block

    def _scanned_blocks(
        self, name: str, attention: Callable[..., nn.Module], length: int
    ) -> nn.Module:
        # The boundary of a loop keeps the compiler from merging the recomputation with the
        # original; unrolled layers, and a loop of one, have no such boundary.
        blocks = nn.scan(
            self._block(prevent_cse=bool(self.unroll) or length == 1),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=length,
            unroll=self.unroll,
        )
        return blocks(attention=attention, name=name, **self._block_options())

    def _plain_blocks(
        self, x: Array, rates: np.ndarray, grid: Grid, train: bool, return_attention: bool
    ) -> tuple[Array, dict[str, Array]]:
        """(B, 1 + N, D) -> the same, or (B, 1, D) of the class token, and the maps, stacked."""
        static = (grid, train, return_attention)
        attention, maps = self._self_attention(), []
        if len(rates) > 1:
            blocks = self._scanned_blocks("blocks", attention, len(rates) - 1)
            x, found = blocks(x, rates[:-1], *static)
            maps.append(found)
        if self.global_pool == "token" and not return_attention:
            attention = functools.partial(attention, queries=1)
        block = self._block(prevent_cse=True)
        block = block(attention=attention, name="last_block", **self._block_options())
        x, found = block(x, rates[-1], *static)
        maps.append(jax.tree.map(lambda a: a[None], found))
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *maps)

    def _block_options(self) -> dict[str, Any]:
        return {
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout,
            "use_drop_path": self.drop_path > 0,
            "dtype": self.dtype,
        }

    def _classify(self, x: Array) -> Array:
        """(B, 1 + N, D) -> pooled and normalised features, and the head's logits; float32."""
        norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm")
        if self.global_pool == "token":
            x = norm(x[:, 0].astype(jnp.float32))  # the norm is token by token: skip the others
        else:
            x = norm(x.astype(jnp.float32))
        if self.global_pool == "avg":
            x = x[:, 1:].mean(axis=1)
        return Linear(self.num_classes, name="head")(x) if self.num_classes else x


def _uniform_init(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound), symmetric: torch.nn.Conv2d's default, which the reference keeps."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
