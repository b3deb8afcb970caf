"""A ConViT on CIFAR-100: python main.py --config=configs/cifar100.py --workdir=DIR

What configs/cifar10.py says holds here.
"""

import ml_collections

from configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.data.update(
        source="tfds:cifar100", mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762)
    )
    return config
