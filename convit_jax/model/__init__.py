"""The model: attention, blocks, the network, its variants and its arithmetic.

Start at `attention` (GPSA, equations 6 and 7 of the paper) and `network` (ConViT). `convit_jax`
exports the names for other projects: ConViT, GPSA, SelfAttention, VARIANTS, create_model.
"""
