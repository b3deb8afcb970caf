"""Prepared tfds data sets: `prepared` finds one, `dataset` opens a split of its `records`."""
