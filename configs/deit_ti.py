"""DeiT-Ti, the paper's baseline: 3 heads, width 192, 5,717,416 parameters.

On one machine, with all of its devices:

    python main.py --config=configs/deit_ti.py --config.data.dir=DATA --workdir=DIR

On a TPU pod slice, with DATA and DIR in a bucket (docs/pods.md has the steps before):

    scripts/tpu_pod.sh run --name=NAME --zone=ZONE --workdir=DIR -- --config=deit_ti \\
        --config.data.dir=DATA

Devices: a batch has 1,024 images, which is 128 on each of 8 devices or 64 on each of 16.
--config.train.accum_steps=4 computes it in four parts, for fewer devices or less memory.

Memory: 1,396 MiB a chip with 128 images, 800 MiB with 64. TPU's compiler counted them for
v5e (16,384 MiB a chip) with jax 0.10.2, libtpu 0.0.52, bfloat16, remat=dots and the whole state on
each of 8 chips. No TPU has run them.

Accuracy: 300 epochs of ImageNet at 224 pixels gave the paper 72.2% top-1 (Table 1).
It has not been reproduced with this code. The paper's GP100 classified 1,442 images a second.
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.paper("deit_tiny")
