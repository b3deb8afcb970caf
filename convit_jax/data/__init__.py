"""Images on the way to the devices.

`open` opens a data set by name, `source` says what a data set is, and `folders`, `tfds_source` and
`arrays` are the kinds there are. `chunks` decides the order of the images, `transforms` augments
them, and `workers` makes batches. `imagenet` writes ImageNet from its tars.
"""
