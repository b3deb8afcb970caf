"""Distillation: a student learns from the answers of a teacher, besides the labels.

The losses are those of DeiT (Touvron et al. 2021, arXiv:2012.12877, section 4, and its code),
without the distillation token: the student's only logits have to please both. The teacher sees the
augmented images that the student sees, in evaluation mode.

Shapes: B batch, C classes of the data.
"""

from collections.abc import Callable
import dataclasses
import logging
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from convit_jax.data import class_mapping
from convit_jax.data.class_mapping import ClassMapping
from convit_jax.model import flops, image_size
from convit_jax.model.network import ConViT
from convit_jax.parallel import sharding
from convit_jax.train import forms
from convit_jax.train.teacher import Teacher

log = logging.getLogger(__name__)

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """A teacher that fits the run, and the loss.

    Attributes:
      teacher: the teacher.
      forward: (parameters of the teacher, its images (B, height, width, channels)) -> its logits.
      mean, std: normalisation of the images of the run.
      classes: logit of the teacher for each class of the data.
      kind: "hard" or "soft", see `distillation_loss`.
      alpha: share of the teacher in the loss.
      tau: temperature of the probabilities, for "soft".
      mesh: mesh of all devices.
    """

    teacher: Teacher
    forward: Callable[[Any, Array], Array]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: ClassMapping
    kind: str
    alpha: float
    tau: float
    mesh: Mesh

    @property
    def shardings(self) -> Any:
        """Sharding of each parameter of the teacher: like the student's, by shape."""
        return sharding.by_shape(self.teacher.params, self.mesh)

    def on_devices(self) -> Any:
        """Returns the parameters of the teacher on the devices. No checkpoint contains them."""
        return jax.device_put(self.teacher.params, self.shardings)

    def logits(self, params: Any, images: Array) -> Array:
        """Returns the teacher's logits for the classes of the data.

        Args:
          params: parameters of the teacher, from `on_devices`.
          images: (B, height, width, channels), normalised by the mean and deviation of the run.

        Returns:
          (B, C) float32, without a gradient.
        """
        images = jax.lax.stop_gradient(images)
        theirs = self.teacher.mean, self.teacher.std
        if theirs != (self.mean, self.std):
            mean, std, their_mean, their_std = (
                np.array(values, np.float32) for values in (self.mean, self.std, *theirs)
            )
            images = images * (std / their_std) + (mean - their_mean) / their_std
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(self.mesh))
        logits = jax.lax.stop_gradient(self.forward(params, images)).astype(jnp.float32)
        return logits if self.classes.is_identity else logits[:, np.array(self.classes.logits)]

    def loss(self, of_labels: Array, logits: Array, theirs: Array) -> Array:
        """Returns the whole loss: (1 - alpha) of the labels' and alpha of the teacher's.

        Args:
          of_labels: the mean loss by the labels.
          logits: (B, C), the student's.
          theirs: (B, C), the teacher's.
        """
        of_teacher = distillation_loss(logits, theirs, self.kind, self.tau)
        return (1 - self.alpha) * of_labels + self.alpha * of_teacher


def distillation_loss(logits: Array, theirs: Array, kind: str, tau: float) -> Array:
    """Returns the mean loss of a batch by the teacher's answers, as DeiT's code computes it.

    "hard" is the cross-entropy with the teacher's most probable class. "soft" is tau^2 times the
    Kullback-Leibler divergence from the teacher's probabilities, softmax(theirs / tau), to the
    student's. The code divides it by B C, where the paper's equation 2 has the mean over B only.

    Args:
      logits: (B, C), the student's.
      theirs: (B, C), the teacher's.
      kind: "hard" or "soft".
      tau: the temperature.
    """
    if kind == "hard":
        labels = theirs.argmax(axis=-1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    ours, theirs = (jax.nn.log_softmax(x / tau) for x in (logits, theirs))
    return tau**2 * (jnp.exp(theirs) * (theirs - ours)).mean()


def fit(
    teacher: Teacher,
    config: ml_collections.ConfigDict,
    student: ConViT,
    class_names: tuple[str, ...],
    mesh: Mesh,
) -> Distillation:
    """Fits a teacher to a run, and logs what it costs.

    Args:
      teacher: the teacher.
      config: the configuration of the run.
      student: the model to train.
      class_names: classes of the data.
      mesh: mesh of all devices.

    Raises:
      ValueError: if the teacher takes other images, or does not know a class of the data.
    """
    _check_images(teacher, student)
    classes = class_mapping.match(
        class_names,
        teacher.class_names,
        teacher.num_classes,
        source=config.data.source,
        loaded=f"the teacher {teacher.source}",
        ordered=config.data.class_order != "sorted",
    )
    if classes.how != "by name" or not classes.is_identity:
        log.info("classes of the teacher: found %s", classes.how)
    share = config.train.batch_size // config.train.accum_steps // mesh.size
    if teacher.batch is not None and share % teacher.batch:
        raise ValueError(
            f"distill.teacher: {teacher.source} takes {teacher.batch} images in a call, but a "
            f"device has {share} at a time: expected a multiple, or a program of any number"
        )
    distillation = Distillation(
        teacher=teacher,
        forward=_forward(teacher, student, mesh),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        classes=classes,
        kind=config.distill.kind,
        alpha=config.distill.alpha,
        tau=config.distill.tau,
        mesh=mesh,
    )
    _describe(distillation, student)
    return distillation


def _check_images(teacher: Teacher, student: ConViT) -> None:
    ours, theirs = student.image_shape, teacher.image_shape
    if ours[2] != theirs[2]:
        raise ValueError(
            f"distill.teacher: expected a network of {ours[2]} channels, as model.in_channels, got "
            f"{theirs[2]} in {teacher.source} (convit convert --in_channels={ours[2]} adapts one)"
        )
    if ours != theirs:
        size, other = (image_size.text(shape[:2]) for shape in (ours, theirs))
        raise ValueError(
            f"distill.teacher: expected a network for images of {size}, as model.image_size, got "
            f"{other} in {teacher.source} (convit convert --image_size={size} adapts one)"
        )


def _forward(teacher: Teacher, student: ConViT, mesh: Mesh) -> Callable[[Any, Array], Array]:
    """Returns (parameters, images) -> logits, in the student's precision for a ConViT or DeiT."""
    if teacher.model is not None:
        model = teacher.model.clone(
            dtype=student.dtype,
            attention="auto",
            positional="auto",
            remat="none",
            flat_tokens=None,
        )
        model = forms.over_mesh(forms.settle(model, mesh.devices.flat[0].platform), mesh)
        return lambda params, images: cast(Array, model.apply({"params": params}, images))
    program = teacher.program
    assert program is not None

    def of_one_device(images: Array) -> Array:
        if teacher.batch is None:
            return program(images)
        calls = images.reshape(-1, teacher.batch, *images.shape[1:])
        return jax.lax.map(program, calls).reshape(len(images), -1)

    # A program has no rules of sharding: each device runs it on its own images.
    over_batch = sharding.over_batch(mesh).spec
    sharded = jax.shard_map(
        of_one_device, mesh=mesh, in_specs=over_batch, out_specs=over_batch, check_vma=False
    )
    return lambda _, images: sharded(images)


def _describe(distillation: Distillation, student: ConViT) -> None:
    teacher = distillation.teacher
    known = teacher.parameters
    log.info(
        "teacher: %s, %s parameters, %s labels, distill.alpha=%g%s",
        teacher.source,
        "an unknown number of" if known is None else f"{known:,}",
        distillation.kind,
        distillation.alpha,
        f", distill.tau={distillation.tau:g}" if distillation.kind == "soft" else "",
    )
    if teacher.flops is None:
        log.info("teacher: its FLOPs are not known, and MFU leaves them out")
    else:
        log.info(
            "teacher: %.3g GFLOPs an image, %.0f%% of the student's %.3g for forward and backward; "
            "MFU leaves them out",
            teacher.flops / 1e9,
            100 * teacher.flops / flops.training_flops(student),
            flops.training_flops(student) / 1e9,
        )
    if teacher.program is not None:
        log.info("teacher: a program computes in the precision with which it was written")
    if (teacher.mean, teacher.std) != (distillation.mean, distillation.std):
        log.info(
            "teacher: its images are normalised by mean %s and std %s, the student's by %s and %s",
            teacher.mean, teacher.std, distillation.mean, distillation.std,
        )  # fmt: skip
