"""FLOPs that a model needs.

With the time of a step and the peak of the device (chips.py) they give the model FLOPs utilisation
(MFU), the share of the device that training uses. MFU is the model's FLOPs per second divided by
the peak FLOPs per second (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B).

Shapes: N patches, D width, R and C rows and columns of the patch grid.
"""

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
