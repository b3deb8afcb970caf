"""DeiT-S+, the paper's baseline: 9 heads, width 576, 49.0 M parameters.

    python main.py --config=configs/deit_s_plus.py --workdir=DIR

A batch of 512: 8 devices with 64 images each, or fewer with more memory or with
--config.train.accum_steps=4.

300 epochs of ImageNet at 224 pixels; the paper reports 79.0 top-1 (Table 1).
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.name = "deit_small_plus"
    # The paper lowers both for its "+" models, to fit 8 GPUs and stay stable.
    config.train.batch_size = 512
    config.optim.lr = 4e-4
    return config
