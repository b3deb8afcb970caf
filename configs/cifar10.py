"""A ConViT on CIFAR-10: 32 x 32 pixels, patches of 4, convit_tiny.

    python main.py --config=configs/cifar10.py --workdir=DIR

Reads tfds' cifar10 (`tfds build cifar10 --file_format=array_record`). The settings are ours and
not the paper's, which has no results on CIFAR; the run has not been tried yet.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.update(name="convit_tiny", image_size=32, patch_size=4)
    config.data.update(
        source="tfds:cifar10",
        repeats=1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )
    config.augment.update(crop="pad", pad_crop=4, eval_crop=1.0)
    config.train.batch_size = 512
    return config
