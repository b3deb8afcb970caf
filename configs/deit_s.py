"""DeiT-S, the paper's baseline: 6 heads, width 384, 22.1 M parameters.

    python main.py --config=configs/deit_s.py --workdir=DIR

300 epochs of ImageNet at 224 pixels; the paper reports 79.8 top-1 (Table 1).
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.name = "deit_small"
    return config
