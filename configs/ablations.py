"""The paper's ablations of ConViT-S+ (Table 3). The letter after the colon is the row.

    python main.py --config=configs/ablations.py:b --config.data.dir=DATA --workdir=DIR

    row  gates        initialisation  positional attention  top-1   10%
    a    trained      convolutional   trained                82.2  59.7
    b    frozen at 0  convolutional   trained                82.0  57.4
    c    trained      random          trained                81.4  56.9
    d    frozen at 0  random          trained                81.6  54.6
    e    a DeiT with the same heads, width and depth         79.1  47.8
    f    frozen at 0  convolutional   frozen                 78.6  54.3
    g    frozen at 0  random          frozen                 73.7  44.8

The last columns are the paper's top-1 on all of ImageNet and on 10% of the training images. The
10% column needs --config.data.sampling_ratio=0.1 and --config.data.epochs_scale=10: ten times the
epochs, so as many images. No row has been reproduced with this code. convit_jax/ablations.py has
the keys that change, and what the paper leaves open. Devices and memory are those of
configs/convit_s_plus.py.
"""

import ml_collections

from convit_jax import ablations, recipe


def get_config(row: str = "a") -> ml_collections.ConfigDict:
    config = recipe.paper("convit_small_plus")
    ablations.apply(config, row)
    return config
