"""Training and evaluation.

`setup` checks a run before the first compilation, `step` defines the training step, and `loop` is
the training loop. `augmentation` runs on the devices, `optim` has the optimiser, and `metrics` and
`windows` report. `eval_setup` and `eval_run` evaluate weights, and `evaluation` has the metrics.
"""
