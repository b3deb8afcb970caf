"""A ConViT on CIFAR-100: 32 x 32 pixels, patches of 4, convit_tiny.

    python main.py --config=configs/cifar100.py --workdir=DIR

Reads the cifar100 of tensorflow-datasets (`tfds build cifar100 --file_format=array_record`). A
laptop or any GPU holds it. The settings are ours, since the paper has no results on CIFAR. Nobody
has run this to its end, so there is no accuracy to expect.
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.cifar(
        "tfds:cifar100", mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762)
    )
