"""DeiT-Ti, the paper's baseline: 3 heads, width 192, 5.7 M parameters.

    python main.py --config=configs/deit_ti.py --workdir=DIR

300 epochs of ImageNet at 224 pixels; the paper reports 72.2 top-1 (Table 1).
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.name = "deit_tiny"
    return config
