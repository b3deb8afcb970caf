"""Fine-tuning on a folder of your own images, from converted ImageNet weights.

    python main.py --config=configs/finetune.py --config.data.source=folder:PATH \\
        --config.init_from=convit_tiny.safetensors --workdir=DIR

PATH holds a folder of images for each class, or train/ and val/ with such folders. The weights
decide the model and its image size. The head starts anew. The batch size is 64, or less for a small
data set. Another --config.model.image_size interpolates the position embedding, and another
--config.model.in_channels adapts the first convolution.

The settings are this project's own: fewer epochs than from scratch, no mixing, and a rate that does
not depend on the batch size and falls from the head to the first block. They were tried on digits
of MNIST, on a CPU: a ConViT of 6 blocks and width 64, trained on 2,000 images of the digits 0 to 4
(92.6%), and fine-tuned on 50 images each of 5 to 9, in batches of 16, for 468 steps. The accuracy
is of one run each, on 500 test images of 5 to 9, where a guess has 20%:

    84.6%  these settings, with --config.augment.flip=0.0 --config.augment.randaugment_ops=0
           --config.augment.scale="(0.5, 1.0)", which suit digits
    89.2%  the same with --config.optim.lr=3e-3
    83.8%  the same with --config.optim.layer_decay=1.0
    55.0%  the same with --config.optim.freeze=backbone
    54.6%  the same from random weights
    15.6%  a peak of 3e-6 (1e-4 x batch / 512) and no layer decay
    46.2%  these settings alone, which mirror digits and crop them to 8% of their area

They have not been tried with ImageNet's weights on photographs.
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    config = recipe.get_config()
    config.model.image_size = None  # that of the weights
    config.init_new_head = True
    config.init_resize_pos_embed = True
    config.init_adapt_channels = True
    config.data.update(source="folder:images", repeats=1)
    config.mixup.update(mixup=0.0, cutmix=0.0)
    config.train.update(epochs=30.0, batch_size=None)
    config.optim.update(lr=1e-3, scale_lr=False, layer_decay=0.75)
    config.optim.update(weight_decay=1e-8, warmup_epochs=1.0, min_lr=1e-6)
    return config
