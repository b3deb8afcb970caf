"""ConViT and DeiT: patches, transformer blocks, the class token, and the paper's variants.

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

from convit_jax.attention import GPSA, Grid, Linear, SelfAttention, linear_init
from convit_jax.sdpa import ATTENTION_OUTPUT, AttentionFn

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

# d'Ascoli et al. 2021, Table 1. DeiT: Touvron et al. 2021 (arXiv:2012.12877), Table 1, and
# the "+" sizes of the same table: the class token enters at the input with a position
# embedding of its own, and q, k, v have biases (facebookresearch/deit).
_DEIT = {"local_up_to_layer": 0, "cls_pos_embed": True, "qkv_bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "convit_tiny": {"num_heads": 4, "embed_dim": 192},
    "convit_tiny_plus": {"num_heads": 4, "embed_dim": 256},
    "convit_small": {"num_heads": 9, "embed_dim": 432},
    "convit_small_plus": {"num_heads": 9, "embed_dim": 576},
    "convit_base": {"num_heads": 16, "embed_dim": 768},
    "convit_base_plus": {"num_heads": 16, "embed_dim": 1024},
    "deit_tiny": {"num_heads": 3, "embed_dim": 192, **_DEIT},
    "deit_tiny_plus": {"num_heads": 4, "embed_dim": 256, **_DEIT},
    "deit_small": {"num_heads": 6, "embed_dim": 384, **_DEIT},
    "deit_small_plus": {"num_heads": 9, "embed_dim": 576, **_DEIT},
    "deit_base": {"num_heads": 12, "embed_dim": 768, **_DEIT},
    "deit_base_plus": {"num_heads": 16, "embed_dim": 1024, **_DEIT},
}


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them: (..., D) -> (..., D)."""

    hidden: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        width = x.shape[-1]
        x = Linear(self.hidden, dtype=self.dtype, name="fc1")(x)
        x = gelu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = Linear(width, dtype=self.dtype, name="fc2")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


def gelu(x: Array) -> Array:
    """x Phi(x), exact, computed in float32 (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    By erf, as PyTorch does; jax.nn.gelu takes erfc, which costs half as much again, forward and
    backward. The two differ by rounding only: 1 + erf loses digits where x Phi(x) is all but 0.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each on a residual branch.

    Attributes:
      attention: makes the attention module; called with a name.
      mlp_ratio: hidden width of the MLP over D.
      dropout: rate inside the MLP.
      use_drop_path: whether a rate of stochastic depth may be other than 0.
      dtype: of the matrix products and the residual stream.
    """

    attention: Callable[..., nn.Module]
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    use_drop_path: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, drop_path: Array, grid: Grid, train: bool, return_attention: bool
    ) -> tuple[Array, dict[str, Array]]:
        """(B, N, D) -> the same, and the attention's maps or {}. `drop_path`: this layer's rate.

        Attention from fewer tokens gives those alone.
        """
        # The two-pass variance: E[x^2] - E[x]^2 cancels where the mean is large.
        norm = functools.partial(
            nn.LayerNorm, epsilon=1e-6, use_fast_variance=False, dtype=self.dtype
        )

        def residual(x: Array, branch: Array) -> Array:
            if train and self.use_drop_path:
                branch = drop_samples(branch, drop_path, self.make_rng("dropout"))
            return x + branch

        branch = self.attention(name="attn")(norm(name="norm1")(x), grid, train, return_attention)
        branch, maps = branch if return_attention else (branch, {})
        x = residual(x[:, : branch.shape[1]], branch)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        branch = Mlp(hidden, self.dropout, self.dtype, name="mlp")(norm(name="norm2")(x), train)
        return residual(x, branch), maps


def drop_samples(branch: Array, rate: Array, rng: Array) -> Array:
    """Stochastic depth: zeroes the branch of whole samples, scales the rest by 1 / (1 - rate).

    Huang et al. 2016 (arXiv:1603.09382), per sample as in timm's DropPath.

    Args:
      branch: (B, ...).
      rate: scalar in [0, 1), probability of zeroing.
      rng: a key; every sample is drawn alone.
    """
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
    return jnp.where(keep, branch / (1.0 - rate).astype(branch.dtype), 0)


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

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    qk_scale: float | None = None
    dropout: float = 0.0
    attn_dropout: float = 0.0
    drop_path: float = 0.0
    local_up_to_layer: int = 10
    locality_strength: float = 1.0
    use_local_init: bool = True
    use_pos_embed: bool = True
    cls_pos_embed: bool = False
    global_pool: str = "token"
    positional: str = "auto"
    attention: str | AttentionFn = "auto"
    unroll: int | bool = False
    remat: str = "dots"
    dtype: Any = jnp.float32

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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images the model is made for."""
        return (*_pair(self.image_size), self.in_channels)

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches of such an image."""
        return self._grid(self.image_shape[:2])

    def _grid(self, image: tuple[int, int]) -> Grid:
        """Rows and columns of patches of any image (height, width)."""
        patch = _pair(self.patch_size)
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
        (height, width), (batch, *_, channels) = _pair(self.patch_size), images.shape
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


def create_model(name: str, **overrides: Any) -> ConViT:
    """Makes one of the paper's models.

    Args:
      name: one of `VARIANTS`.
      **overrides: options of `ConViT` in place of the variant's.

    Raises:
      ValueError: if the name or an option is unknown, or the options do not fit together.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model: expected one of {', '.join(VARIANTS)}, got {name!r}")
    options = [field.name for field in dataclasses.fields(ConViT)]
    options = sorted(set(options) - {"name", "parent"})
    unknown = sorted(set(overrides) - set(options))
    if unknown:
        raise ValueError(
            f"unknown options of {name}: expected some of {', '.join(options)}, "
            f"got {', '.join(unknown)}"
        )
    return ConViT(**{**VARIANTS[name], **overrides})


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _uniform_init(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound), symmetric: torch.nn.Conv2d's default, which the reference keeps."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
