"""DeiT-B+, the paper's baseline: 16 heads, width 1024, 153,171,944 parameters.

On one machine, with all of its devices:

    python main.py --config=configs/deit_b_plus.py --config.data.dir=DATA --workdir=DIR

On a TPU pod slice, with DATA and DIR on file systems that its hosts see:

    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd convit && \\
        python main.py --config=configs/deit_b_plus.py --config.data.dir=DATA --workdir=DIR"

Devices: a batch has 512 images, which is 128 on each of 4 devices or 64 on each of 8.
--config.train.accum_steps=4 computes it in four parts, for fewer devices or less memory.

Memory: 9,740 MiB a chip with 128 images, 6,182 MiB with 64. TPU's compiler counted them for
v5e (16,384 MiB a chip) with jax 0.10.2, libtpu 0.0.52, bfloat16, remat=dots and the whole state on
each of 8 chips. No TPU has run them.

Accuracy: 300 epochs of ImageNet at 224 pixels gave the paper 77.5% top-1 (Table 1).
It has not been reproduced with this code. The paper's GP100 classified 114 images a second.
"""

import ml_collections

from convit_jax import recipe


def get_config() -> ml_collections.ConfigDict:
    return recipe.paper("deit_base_plus")
