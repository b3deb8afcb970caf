"""ConViT and DeiT: patches, transformer blocks and the class token.

The GPSA blocks run under one `nn.scan` and the plain blocks under another. So the parameters of
each group have a leading layer axis: `params["gpsa_blocks"]["attn"]["gate"]` is (10, H). The last
block is a module of its own, `params["last_block"]`. Where only the class token is classified, the
last block computes that token alone, which a block inside a scan cannot do.

Shapes: B batch, N patches, H heads, D width, L layers of a group, R and C rows and columns of
patches.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.model.attention import GPSA, Grid, SelfAttention
from convit_jax.model.block import Block, MapsFunction, Returned
from convit_jax.model.image_size import pair
from convit_jax.model.intermediates import check_blocks, check_offsets, feature_map
from convit_jax.model.linear import Linear, linear_init
from convit_jax.model.remat import POLICIES, REMAT, finish_backward
from convit_jax.model.sdpa import Attention

Array = jax.Array

GLOBAL_POOLS = ("token", "avg", "none")


def _option(kind: str, default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind})


# The kinds of options. Each field of ConViT states its kind; `variants.options_of_kind` reads it.
structure = functools.partial(_option, "structure")  # decides the parameters and their shapes
changeable = functools.partial(_option, "changeable")  # decides shapes that `weights.adapt` can fit
function = functools.partial(_option, "function")  # changes the outputs, not the parameters
training = functools.partial(_option, "training")  # affects initialisation and training only
computation = functools.partial(_option, "computation")  # affects speed, memory and rounding only


class ConViT(nn.Module):
    """The ConViT image classifier (d'Ascoli et al. 2021), and DeiT as its baseline.

    Blocks 0 to local_up_to_layer - 1 are GPSA blocks over the patches. The class token is then
    put in front of the patches, and the remaining blocks are plain self-attention.

    Attributes:
      image_size: size of the images in pixels; one number for a square, or (height, width).
      patch_size: size of the patches in pixels, in the same form; must divide image_size.
      in_channels: number of channels of the images.
      num_classes: number of logits. 0 leaves out the head, and the model returns features.
      embed_dim: D, the width.
      depth: number of blocks.
      num_heads: H; must divide D.
      mlp_ratio: hidden width of the MLPs divided by D.
      qkv_bias: whether query, key and value projections have biases.
      qk_scale: factor of the content scores; None means (D / H) ** -0.5.
      dropout: dropout rate after the position embedding, of the attention outputs and in the MLPs.
      attn_dropout: dropout rate of the attention maps, which must then be written out, see `GPSA`.
      drop_path: rate of stochastic depth of the last block; the rates grow linearly from 0 at the
        first block.
      local_up_to_layer: number of GPSA blocks; must be less than depth. 0 gives a plain ViT.
      locality_strength: the paper's alpha, see `GPSA`.
      use_local_init: whether GPSA blocks get the convolutional initialisation, see `GPSA`.
      gate_init: initial value of the gates, see `GPSA`.
      use_pos_embed: whether a learned position embedding is added to the patches. Without it
        the model takes images of any size that patch_size divides.
      cls_pos_embed: whether the class token has a position embedding too, as in DeiT; needs
        local_up_to_layer=0 and use_pos_embed=True.
      global_pool: what is classified: "token", the class token; "avg", the mean of the patches;
        "none", every token on its own, the class token first.
      positional: "auto", "blend" or "contract", see `GPSA`.
      attention: "auto", "xla", "chunked", "cudnn", "fused", a function or a `Fused`, see `GPSA`,
        `convit_jax.model.sdpa` and `convit_jax.model.fused`.
      unroll: number of layers in one iteration of a scan; True means all layers. Changes speed
        and memory, not results.
      remat: what the backward pass computes again instead of reading it from memory: "none",
        nothing; "dots", everything except the outputs of attention and of matrix products with
        weights; "mlp", the hidden layers of the MLPs too; "block", everything except the inputs of
        the blocks.
      flat_tokens: whether the linear layers of the blocks see images and tokens as one axis. Faster
        on a CPU, slower on a TPU; the results are the same. None means True on a CPU.
      dtype: dtype of the matrix products and the residual stream. Parameters, softmaxes, gates,
        statistics of the norms and logits are float32.

    Raises:
      ValueError: on construction, if an option is out of range or options do not fit together.
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
    gate_init: float = training(1.0)
    use_pos_embed: bool = structure(True)
    cls_pos_embed: bool = structure(False)
    global_pool: str = function("token")
    positional: str = computation("auto")
    attention: Attention = computation("auto")
    unroll: int | bool = computation(False)
    remat: str = computation("dots")
    flat_tokens: bool | None = computation(None)
    dtype: Any = computation(jnp.float32)

    def __post_init__(self) -> None:
        self._check_options()
        super().__post_init__()

    @nn.nowrap
    def _check_options(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim={self.embed_dim}, got {self.num_heads}"
            )
        if not 0 <= self.local_up_to_layer < self.depth:
            # With GPSA blocks only, the class token would never be added. The original code accepts
            # this and classifies from the first patch without a warning.
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
        self.grid_of(self.image_shape[:2])
        # The attention module checks its options when it is made.
        (self._gpsa() if self.local_up_to_layer else self._self_attention())(parent=None)

    @nn.nowrap
    def check_classifies(self, who: str) -> None:
        """Raises ValueError unless the model returns one vector of logits for each image.

        Args:
          who: the use or the weights; the error message begins with it.
        """
        if not self.num_classes or self.global_pool == "none":
            raise ValueError(
                f"{who} needs one vector of logits an image: expected model.num_classes > 0 and "
                f"model.global_pool token or avg, got {self.num_classes} and {self.global_pool}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (height, width, channels) of the images that the model is made for."""
        return (*pair(self.image_size), self.in_channels)

    @property
    def grid(self) -> Grid:
        """Rows and columns of the patch grid of an image of `image_size`."""
        return self.grid_of(self.image_shape[:2])

    @nn.nowrap
    def grid_of(self, image: tuple[int, int]) -> Grid:
        """Returns rows and columns of the patch grid of an image of size (height, width).

        Raises:
          ValueError: if patch_size does not divide the size.
        """
        patch = pair(self.patch_size)
        if any(side < 1 for side in (*patch, *image)) or image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(
                f"image_size: expected a multiple of patch_size={self.patch_size}, got {image}"
            )
        return image[0] // patch[0], image[1] // patch[1]

    @nn.nowrap
    def _self_attention(self) -> functools.partial[SelfAttention]:
        return functools.partial(
            SelfAttention,
            num_heads=self.num_heads,
            qkv_bias=self.qkv_bias,
            qk_scale=self.qk_scale,
            attn_dropout=self.attn_dropout,
            dropout=self.dropout,
            attention=self.attention,
            flat_tokens=self.flat_tokens,
            dtype=self.dtype,
        )

    @nn.nowrap
    def _gpsa(self) -> functools.partial[GPSA]:
        return functools.partial(
            GPSA,
            **self._self_attention().keywords,
            locality_strength=self.locality_strength,
            use_local_init=self.use_local_init,
            gate_init=self.gate_init,
            positional=self.positional,
        )

    @nn.compact
    def __call__(
        self,
        images: Array,
        train: bool = False,
        return_attention: bool | MapsFunction = False,
        return_features: Sequence[int] | None = None,
        norm_features: bool = False,
        attention_offsets: Mapping[str, Array] | None = None,
    ) -> Array | tuple[Any, ...]:
        """Classifies images.

        Args:
          images: (B, height, width, in_channels), normalised, floating point.
          train: whether dropout and stochastic depth are on. A rate above 0 then needs the rng
            stream "dropout".
          return_attention: whether to compute and return the attention maps of every layer too.
            The maps are those of this forward pass: each layer computes them from its own input.
            Or a function of the maps of one layer, such as `lambda maps: maps["content"].max()`:
            its results are returned in their place. Then no more than one layer's maps are in
            memory at a time.
          return_features: numbers of blocks whose outputs to return too, such as (3, 6, 9). Blocks
            are counted from 0; -1 is the last block.
          norm_features: whether the final norm is applied to these outputs.
          attention_offsets: arrays added to the attention maps, to differentiate by or to change
            the maps. Keys and shapes are those of the maps: "gpsa_blocks" (L, B, H, N, N), added
            to the blended maps, and "blocks" (L, B, H, 1 + N, 1 + N). A group may be left out.

        Returns:
          Logits (B, num_classes) float32, or features (B, D) float32 with num_classes=0. With
          global_pool="none" their shapes are (B, 1 + N, num_classes) and (B, 1 + N, D).
          With `return_attention` or `return_features` a tuple: logits, then maps, then features.
          The maps are {"gpsa_blocks": maps of `GPSA`, "blocks": maps of `SelfAttention`}, each map
          with a leading layer axis L; so have the results of a function of the maps. The features
          are one (B, R, C, D) for each of the blocks, in the order asked for, without the class
          token; float32 with `norm_features`, else `dtype`.

          With any of these options the last block computes all tokens, so the logits differ by
          rounding and dropout draws other random numbers.

        Raises:
          ValueError: if the images do not have the shape that the model was made for or are not
            floating point, the model has no such block, or an offset has another shape than its
            maps.
        """
        grid = self._check_images(images)
        chosen = None if return_features is None else check_blocks(return_features, self.depth)
        layers = {"gpsa_blocks": self.local_up_to_layer} if self.local_up_to_layer else {}
        layers["blocks"] = self.depth - self.local_up_to_layer
        offsets = check_offsets(attention_offsets, layers)
        x = self._embed_patches(images)
        token = self.param("cls_token", linear_init, (1, 1, self.embed_dim), jnp.float32)
        token = token.astype(self.dtype)

        def prepend_token(x: Array) -> Array:
            tokens = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
            return jnp.concatenate([tokens, x], axis=1)

        if self.cls_pos_embed:
            x = prepend_token(x)
        if self.use_pos_embed:
            position = self.param("pos_embed", linear_init, (1, *x.shape[1:]), jnp.float32)
            x += position.astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)

        static = (grid, train, Returned(return_attention, tokens=chosen is not None))
        rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
        rates, plain_rates = np.split(rates, [self.local_up_to_layer])
        found = {}
        if self.local_up_to_layer:
            blocks = self._scanned_blocks("gpsa_blocks", self._gpsa(), len(rates))
            x, found["gpsa_blocks"] = blocks(x, rates, offsets.get("gpsa_blocks"), *static)
        if not self.cls_pos_embed:
            x = prepend_token(x)

        def plain_blocks(model: "ConViT", x: Array) -> tuple[Array, dict[str, Any]]:
            return model._plain_blocks(x, plain_rates, offsets.get("blocks"), *static)

        if train and self.local_up_to_layer and not self.is_initializing():
            x, found["blocks"] = finish_backward(self, ("blocks", "last_block"), x, plain_blocks)
        else:
            x, found["blocks"] = plain_blocks(self, x)

        norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm")
        outputs: list[Any] = [self._classify(x, norm)]
        if return_attention:
            outputs.append({group: of_group["attention"] for group, of_group in found.items()})
        if chosen is not None:
            tokens = [layer for of_group in found.values() for layer in of_group["tokens"]]
            features = [feature_map(tokens[block], grid) for block in chosen]
            if norm_features:
                features = [norm(feature.astype(jnp.float32)) for feature in features]
            outputs.append(tuple(features))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _check_images(self, images: Array) -> Grid:
        height, width, channels = self.image_shape
        shape = images.shape
        if len(shape) != 4 or shape[3] != channels:
            raise ValueError(f"images: expected (batch, height, width, {channels}), got {shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images: expected floating point, normalised, got {images.dtype}. "
                "convit_jax.model.normalise.normalise(pixels, IMAGENET_MEAN, IMAGENET_STD) "
                "makes it of uint8"
            )
        if self.use_pos_embed and shape[1:3] != (height, width):
            raise ValueError(
                f"images: expected {height} x {width} pixels (image_size, which the position "
                f"embedding was made for), got {shape[1]} x {shape[2]}"
            )
        return self.grid_of((shape[1], shape[2]))

    def _embed_patches(self, images: Array) -> Array:
        """Embeds patches: (B, height, width, channels) -> (B, N, D), patches in row-major order.

        The windows of this convolution do not overlap, so it is computed as a matrix product, twice
        as fast on a CPU. The kernel keeps a convolution's shape, (height, width, channels, D).
        """
        (height, width), (batch, *_, channels) = pair(self.patch_size), images.shape
        rows, columns = self.grid_of((images.shape[1], images.shape[2]))
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
        """Returns the constructor of a block that is rematerialised as `remat` says."""
        block = Block
        if self.remat != "none":
            block = nn.remat(
                block,
                policy=POLICIES[self.remat],
                prevent_cse=prevent_cse,
                static_argnums=(4, 5, 6),
            )
        return block

    def _scanned_blocks(
        self, name: str, attention: Callable[..., nn.Module], length: int
    ) -> nn.Module:
        # A loop's boundary keeps the compiler from merging the recomputation with the original
        # computation. Unrolled layers and a loop of one iteration have no such boundary.
        blocks = nn.scan(
            self._block(prevent_cse=bool(self.unroll) or length == 1),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=length,
            unroll=self.unroll,
        )
        return blocks(attention=attention, name=name, **self._block_options())

    def _plain_blocks(
        self,
        x: Array,
        rates: np.ndarray,
        offsets: Array | None,
        grid: Grid,
        train: bool,
        returned: Returned,
    ) -> tuple[Array, dict[str, Any]]:
        """Applies the plain blocks: (B, 1 + N, D) -> (B, 1 + N, D) and what they return, stacked.

        If only the class token is read, only that is returned, (B, 1, D).
        """
        static = (grid, train, returned)
        attention, results = self._self_attention(), []
        scanned, last = (None, None) if offsets is None else (offsets[:-1], offsets[-1])
        if len(rates) > 1:
            blocks = self._scanned_blocks("blocks", attention, len(rates) - 1)
            x, found = blocks(x, rates[:-1], scanned, *static)
            results.append(found)
        if self.global_pool == "token" and offsets is None and not any(returned):
            attention = functools.partial(attention, queries=1)
        block = self._block(prevent_cse=True)
        block = block(attention=attention, name="last_block", **self._block_options())
        x, found = block(x, rates[-1], last, *static)
        results.append(jax.tree.map(lambda a: a[None], found))
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *results)

    def _block_options(self) -> dict[str, Any]:
        return {
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout,
            "use_drop_path": self.drop_path > 0,
            "flat_tokens": self.flat_tokens,
            "dtype": self.dtype,
        }

    def _classify(self, x: Array, norm: nn.LayerNorm) -> Array:
        """Pools and normalises (B, 1 + N, D) and applies the head; returns float32."""
        x = x.astype(jnp.float32)
        x = norm(x[:, 0] if self.global_pool == "token" else x)  # no other token is read
        if self.global_pool == "avg":
            x = x[:, 1:].mean(axis=1)
        return Linear(self.num_classes, name="head")(x) if self.num_classes else x


def _uniform_init(bound: float) -> nn.initializers.Initializer:
    """Returns an initialiser that draws from U(-bound, bound).

    This is the default of torch.nn.Conv2d, which the reference code keeps.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
