"""FLOPs that a model needs, and peak FLOPs per second of a device.

With the time of a step they give the model FLOPs utilisation (MFU), the share of the device that
training uses. MFU is the model's FLOPs per second divided by the peak FLOPs per second (Chowdhery
et al. 2022, PaLM, arXiv:2204.02311, appendix B).

Shapes: N patches, D width, R and C rows and columns of the patch grid.
"""

import re

import jax
import jax.numpy as jnp

from convit_jax.model.attention import choose_forms
from convit_jax.model.network import ConViT


def forward_flops(model: ConViT) -> float:
    """Returns the FLOPs of the forward pass of one image.

    A multiplication and its addition in a matrix product count as two FLOPs. All matrix products
    are counted: patch embedding, projections, attention scores, averages of the values, MLPs and
    head. Elementwise operations are not counted: norms, softmaxes, GELU, and with
    positional="blend" the mixing of the two attention maps. positional="contract" adds two matrix
    products for each GPSA block. With global_pool="token" the last block computes its output for
    the class token only.
    """
    rows, columns = model.grid
    patches, width = rows * columns, model.embed_dim
    tokens = patches + 1
    mlp = 2 * width * int(width * model.mlp_ratio)

    def block(queries: int, keys: int) -> int:
        # Query, key and value projections; scores and averages of the values; output projection
        # and MLP.
        return 3 * keys * width**2 + 2 * queries * keys * width + queries * (width**2 + mlp)

    gpsa_block = block(patches, patches)
    _, positional = choose_forms(
        model.attention, model.positional, patches, model.attn_dropout,
        dtype=model.dtype, width=width // model.num_heads, heads=model.num_heads,
    )  # fmt: skip
    if positional == "contract":
        gpsa_block += patches * (rows + columns) * width
    patch_embed = model.image_shape[0] * model.image_shape[1] * model.in_channels * width
    tokens_out = tokens if model.global_pool == "none" else 1
    products = (
        patch_embed
        + model.local_up_to_layer * gpsa_block
        + (model.depth - model.local_up_to_layer - 1) * block(tokens, tokens)
        + block(1 if model.global_pool == "token" else tokens, tokens)
        + tokens_out * width * model.num_classes
    )
    return 2.0 * products


def training_flops(model: ConViT) -> float:
    """Returns the FLOPs of training on one image: the forward and the backward pass.

    The backward pass counts twice the forward pass. Operations that rematerialisation repeats are
    not counted: MFU measures the FLOPs that the model needs, not those that the device executes.
    """
    return 3.0 * forward_flops(model)


# Peak FLOPs per second of dense matrix products on one JAX device. The columns are a pattern of its
# `device_kind`, the figure for bfloat16 inputs, and the figure for float32 inputs. The float32
# figure assumes JAX's default precision, which is TF32 on NVIDIA since Ampere and bfloat16 on TPU
# (docs.jax.dev/en/latest/201/precision.html). NVIDIA's figures "with sparsity" are twice the dense
# figures. Cloud TPU's figures are for a chip; on v2 and v3 a JAX device is half a chip.
_PEAKS: tuple[tuple[str, float | None, float], ...] = (
    # V100 data sheet, SXM2 and PCIe. A V100 has no bfloat16 units.
    (r"(Tesla|NVIDIA) V100-SXM2-\d+GB", None, 15.7e12),
    (r"(Tesla|NVIDIA) V100-PCIE-\d+GB", None, 14e12),
    # A100 data sheet: SXM and PCIe have the same figures.
    (r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe", 312e12, 156e12),
    (r"NVIDIA L4", 121e12, 60e12),  # L4 data sheet, 242 and 120 with sparsity
    (r"NVIDIA H100 PCIe", 756e12, 378e12),  # H100 data sheet, 1,513 and 756 with sparsity
    (r"NVIDIA H100 80GB HBM3", 989e12, 494e12),  # H100 SXM data sheet, sparse 1,979 and 989
    (r"NVIDIA H200", 989e12, 494e12),  # H200 SXM data sheet, sparse 1,979 and 989
    (r"NVIDIA B200", 2250e12, 1100e12),  # HGX B200 data sheet, 4,500 and 2,200 with sparsity
    (r"TPU v2", 23e12, 23e12),  # Jouppi et al. 2020, doi:10.1145/3360307: 46 per chip
    (r"TPU v3", 61.5e12, 61.5e12),  # cloud.google.com/tpu/docs/v3: 123 per chip
    (r"TPU v4", 275e12, 275e12),  # cloud.google.com/tpu/docs/v4
    (r"TPU v5( lite|e)", 197e12, 197e12),  # cloud.google.com/tpu/docs/v5e
    (r"TPU v5p?", 459e12, 459e12),  # cloud.google.com/tpu/docs/v5p
    (r"TPU v6( lite|e)", 918e12, 918e12),  # cloud.google.com/tpu/docs/v6e
)


def peak_flops(device: jax.Device, dtype: jnp.dtype) -> float | None:
    """Returns the peak FLOPs per second of dense matrix products on a device.

    Returns None if the peak is not known.

    Args:
      device: recognised by its `device_kind`. A slice of a GPU (MIG) reports another kind, so its
        peak is None.
      dtype: dtype of the inputs, bfloat16 or float32. The figure for float32 holds at JAX's
        default precision; raising `jax_default_matmul_precision` lowers the real peak.
    """
    column = {"bfloat16": 0, "float32": 1}.get(jnp.dtype(dtype).name)
    for kind, *peaks in _PEAKS:
        if re.fullmatch(kind, device.device_kind):
            return None if column is None else peaks[column]
    return None
