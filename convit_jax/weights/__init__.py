"""Weights in and out: `load` reads whatever holds them, one module writes or reads each format.

`state_dict` is the table between PyTorch's names and Flax's, `infer` finds the model's options from
shapes, and `adapt` fits weights to another head, image size or number of channels. What other
projects use is exported by `convit_jax`: load, from_torch, to_torch.
"""
