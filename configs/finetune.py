"""Fine-tuning on a folder of your own images, from converted ImageNet weights.

    python main.py --config=configs/finetune.py --config.data.source=folder:PATH \\
        --config.init_from=convit_tiny.safetensors --workdir=DIR

PATH holds a folder of images for each class, or train/ and val/ with such folders. The weights
decide the model and its image size. The head starts anew. The batch size is 64, or less for a small
data set. Another --config.model.image_size interpolates the position embedding, and another
--config.model.in_channels adapts the first convolution.

The settings are this project's own: fewer epochs than from scratch, no mixing, and a rate that does
not depend on the batch size and falls from the head to the first block.
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
