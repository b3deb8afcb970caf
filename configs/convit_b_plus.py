"""ConViT-B+: 16 heads, width 1024, 153.1 M parameters.

    python main.py --config=configs/convit_b_plus.py --workdir=DIR

A batch of 512: 8 devices with 64 images each, or fewer with more memory or with
--config.train.accum_steps=4.

300 epochs of ImageNet at 224 pixels; the paper reports 82.5 top-1, 95.9 top-5 (Table 1).
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.paper("convit_base_plus")
