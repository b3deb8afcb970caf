"""A ConViT on CIFAR-100: images of 32 x 32 pixels, patches of 4, convit_tiny.

    python main.py --config=configs/cifar100.py --workdir=DIR

Reads the cifar100 of tensorflow-datasets, which this prepares (with TensorFlow):

    tfds build cifar100 --file_format=array_record

A laptop or any GPU has the memory. The paper has no results on CIFAR: the settings are this
project's own. Nobody has trained this to the end, so no accuracy is given.
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.cifar(
        "tfds:cifar100", mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762)
    )
