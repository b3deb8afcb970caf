"""One step of training, and the state that it carries from step to step."""

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from convit_jax.model.locality import gates
from convit_jax.model.network import ConViT
from convit_jax.parallel import sharding
from convit_jax.train import forms, freezing, optim
from convit_jax.train.augmentation import BatchAugmentation
from convit_jax.train.distillation import Distillation
from convit_jax.train.freezing import Frozen


class TrainState(flax.struct.PyTreeNode):
    """Everything that training carries from step to step.

    Attributes:
      step: number of finished steps.
      params: parameters of the model.
      opt_state: state of the optimiser.
      ema: averaged weights; None if the run has none.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema: Any = None


Batch = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The training step of a run, and the parts that it is made of.

    Attributes:
      config: the configuration, see `convit_jax.recipe`.
      model: the model to train.
      optimizer: turns gradients into updates of the parameters.
      schedule: learning rate by step, for the metrics.
      mesh: mesh of all devices.
      frozen: parameters that are frozen; None trains all.
      distillation: the teacher and its loss; None learns from the labels alone.
    """

    config: ml_collections.ConfigDict
    model: ConViT
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    frozen: Frozen | None = None
    distillation: Distillation | None = None

    @classmethod
    def make(
        cls,
        config: ml_collections.ConfigDict,
        model: ConViT,
        mesh: Mesh,
        steps_per_epoch: float,
        total_steps: int,
        distillation: Distillation | None = None,
    ) -> "Program":
        """Makes a program from a model, with the recipe's optimiser and schedule.

        Raises:
          ValueError: if the configuration freezes parameters that the model does not have, or says
            how long without saying which.
        """
        schedule = optim.learning_rate(
            config.optim, config.train.batch_size, steps_per_epoch, total_steps
        )
        frozen, epochs = None, config.optim.freeze_epochs
        if config.optim.freeze:
            images = jnp.zeros((1, *model.image_shape))
            params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
            steps = max(1, round(epochs * steps_per_epoch)) if epochs else None
            frozen = freezing.find(config.optim.freeze, params, steps)
        elif epochs:
            raise ValueError(f"optim.freeze_epochs={epochs:g}: expected optim.freeze with it")
        optimizer = optim.make_optimizer(config.optim, schedule, frozen)
        model = forms.over_mesh(model, mesh)
        return cls(config, model, optimizer, schedule, mesh, frozen, distillation)

    @functools.cached_property
    def augmentation(self) -> BatchAugmentation:
        """The augmentation of a batch on the devices.

        Raises:
          ValueError: if an option of the augmentation is not valid.
        """
        return BatchAugmentation(
            num_classes=self.model.num_classes,
            mean=self.config.data.mean,
            std=self.config.data.std,
            smoothing=self.config.train.label_smoothing,
            **self.config.mixup,
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of a state, as `jax.ShapeDtypeStruct`."""
        shapes = jax.eval_shape(self._first_state)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            sharding.by_shape(shapes, self.mesh),
        )

    @property
    def state_shardings(self) -> TrainState:
        """Sharding of each array of a state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def init_state(self) -> TrainState:
        """Returns the state before the first step, made on the devices with its shardings."""
        # The program runs once. On a CPU the default level takes up to 1.7 times as long to compile
        # it, and gives the same numbers.
        level, is_cpu = (
            "xla_backend_optimization_level",
            self.mesh.devices.flat[0].platform == "cpu",
        )
        is_default = level not in os.environ.get("XLA_FLAGS", "")
        options = {level: 1} if is_cpu and is_default else None
        return jax.jit(
            self._first_state, out_shardings=self.state_shardings, compiler_options=options
        )()

    def _first_state(self) -> TrainState:
        images = jnp.zeros((1, *self.model.image_shape))
        params = self.model.init(jax.random.key(self.config.seed), images)["params"]
        ema = params if self.config.optim.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), ema)

    def jitted_step(self) -> jax.stages.Wrapped:
        """Returns a jitted (state, batch) -> (state, metrics); the old state is donated.

        With a teacher, its parameters are a third argument, see `Distillation.on_devices`.

        The randomness of a step is a function of (seed, step). The batch is "image" (B, height,
        width, channels) uint8, "label" (B,), and "skipped" (B,), the number of corrupt images that
        each image replaces. The metrics are "loss", "grad_norm" (the norm of the gradients before
        clipping), "learning_rate" and "skipped_images". A model with GPSA also has "gates":
        (layers,), the mean over the heads of sigmoid(gate) after the step.
        """
        teacher = () if self.distillation is None else (self.distillation.shardings,)
        return jax.jit(
            self._train_step,
            in_shardings=(self.state_shardings, sharding.over_batch(self.mesh), *teacher),
            out_shardings=(self.state_shardings, sharding.replicated(self.mesh)),
            donate_argnums=0,
        )

    def _train_step(
        self, state: TrainState, batch: Batch, teacher: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        augmented = self.augmentation(batch["image"], batch["label"], augment_key)
        loss_fn = functools.partial(self._loss, teacher=teacher)
        loss, grads = optim.mean_gradients(
            loss_fn, state.params, augmented, dropout_key, self.config.train.accum_steps
        )
        if self.frozen is not None:
            grads = self.frozen.gradients(state.step, grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optim.update_ema(state.ema, params, self.config.optim.ema_decay)
        if self.frozen is not None:
            params = self.frozen.kept(state.step, state.params, params)
            ema = None if ema is None else self.frozen.kept(state.step, state.ema, ema)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": self.schedule(state.step),
            "skipped_images": batch["skipped"].sum(),
        }
        if "gpsa_blocks" in params:
            metrics["gates"] = gates(params).mean(axis=-1)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    def _loss(
        self, params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array, teacher: Any
    ) -> jax.Array:
        """Returns the mean loss of augmented images, by their label distributions and a teacher."""
        images, labels = batch
        if self.frozen is not None:
            params = self.frozen.without_gradient(params)
        # Gather split parameters here. Without this, XLA would move activations between devices.
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(self.mesh))
        logits = self.model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        loss = optax.softmax_cross_entropy(logits, labels).mean()
        if self.distillation is None:
            return loss
        theirs = self.distillation.logits(teacher, images)
        return self.distillation.loss(loss, cast(jax.Array, logits), theirs)
