"""A ConViT on CIFAR-10: images of 32 x 32 pixels, patches of 4, convit_tiny.

    python main.py --config=configs/cifar10.py --workdir=DIR

Reads the cifar10 of tensorflow-datasets, which this prepares (with TensorFlow):

    tfds build cifar10 --file_format=array_record

A laptop or any GPU has the memory. The paper has no results on CIFAR: the settings are this
project's own. Nobody has trained this to the end, so no accuracy is given.
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.cifar("tfds:cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
