"""Images on the way to the devices.

`open` opens a data set by name. `source` defines the interface of a data set, and `folders`,
`tfds_source` and `arrays` implement it. `layouts` recognises how folders are laid out, and
`held_out` divides what has no second split. `chunks` decides the order of the images, `transforms`
augments them, and `workers` makes batches. `imagenet` writes ImageNet from its tars.
"""
