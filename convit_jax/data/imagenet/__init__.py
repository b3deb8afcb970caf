"""The preparation of ImageNet: `prepare` writes it as tfds does, `tar_files` reads the tars."""
