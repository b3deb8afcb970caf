"""ConViT-Ti: 4 heads, width 192, 5.7 M parameters.

    python main.py --config=configs/convit_ti.py --workdir=DIR

300 epochs of ImageNet at 224 pixels; the paper reports 73.1 top-1, 91.7 top-5 (Table 1).
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.name = "convit_tiny"
    return config
