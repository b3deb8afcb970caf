"""Images on the way to the devices.

`open` opens a data set by name. `source` defines the interface of a data set; `folders`, `tfds` and
`arrays` implement it. `images` decodes and augments an image. `batches` decides the order of the
images and makes batches ahead. `identity` says which images a run uses, and `held_out` which of
them are held out. `imagenet` writes ImageNet from its tars.
"""
