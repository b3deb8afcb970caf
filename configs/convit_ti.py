"""ConViT-Ti: 4 heads, width 192, 5.7 M parameters.

    python main.py --config=configs/convit_ti.py --workdir=DIR

A batch of 1024: 16 devices with 64 images each, or fewer with more memory or with
--config.train.accum_steps=4.

300 epochs of ImageNet at 224 pixels; the paper reports 73.1 top-1, 91.7 top-5 (Table 1).
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.paper("convit_tiny")
