"""Reading and writing weights. `load` reads every kind of source; each format has its module.

`state_dict` is the table between PyTorch's names and Flax's, `infer` finds the model's options from
shapes, and `adapt` fits weights to another head, image size or number of channels. `publish` writes
a repository on huggingface.co, and `digest` is a hash of weights. `convit_jax` exports the names
for other projects: load, from_torch, to_torch.
"""
