"""DeiT-Ti+, the paper's baseline: 4 heads, width 256, 10.0 M parameters.

    python main.py --config=configs/deit_ti_plus.py --workdir=DIR

A batch of 512: 8 devices with 64 images each, or fewer with more memory or with
--config.train.accum_steps=4.

300 epochs of ImageNet at 224 pixels; the paper reports 75.9 top-1 (Table 1).
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.paper("deit_tiny_plus")
