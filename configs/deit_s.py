"""DeiT-S, the paper's baseline: 6 heads, width 384, 22.1 M parameters.

    python main.py --config=configs/deit_s.py --workdir=DIR

A batch of 1024: 16 devices with 64 images each, or fewer with more memory or with
--config.train.accum_steps=4.

300 epochs of ImageNet at 224 pixels; the paper reports 79.8 top-1 (Table 1).
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.paper("deit_small")
