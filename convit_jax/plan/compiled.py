"""Compiles the real training step for a mesh of devices, and counts what it costs."""

from collections.abc import Iterator
import contextlib
import dataclasses
import logging
import math
import re
import threading
import time
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections

from convit_jax.model.flops import training_flops
from convit_jax.model.network import ConViT
from convit_jax.parallel import sharding
from convit_jax.plan import arithmetic, traffic
from convit_jax.plan import collectives as sent
from convit_jax.plan.hlo import Program as Compiled
from convit_jax.train import distillation
from convit_jax.train.distillation import Distillation
from convit_jax.train.step import Program, TrainState
from convit_jax.train.teacher import Teacher

log = logging.getLogger(__name__)

_SAY_EVERY = 10.0  # seconds


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a step on one device in bytes, by the compiler's `memory_analysis`.

    Attributes:
      arguments: the state and the batch.
      temporaries: what lives within the step, such as activations.
      results: results that do not take the place of an argument, as the new state does.
      program: the program itself.
    """

    arguments: int
    temporaries: int
    results: int
    program: int

    @classmethod
    def of(cls, stats: Any) -> "Memory":
        """Reads `jax.stages.Compiled.memory_analysis()`."""
        return cls(
            arguments=stats.argument_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
            program=stats.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries + self.results + self.program


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step costs.

    Attributes:
      name: what differs from the configuration, such as "remat=block".
      images: number of images in a step, over all devices.
      mesh: {axis: number of devices}.
      state_bytes: size of the state on one device, from its shapes.
      model_flops: FLOPs that the model needs in a step, over all devices; a teacher's are left out.
      arithmetic: matrix products of a step, over all devices.
      seconds: time to compile it.
      refusal: the compiler's words if it needs more memory than a device has, else None.
      memory: memory on one device; None if the compiler refused.
      bytes_moved: bytes that one device reads and writes in its main memory in a step.
      xla_bytes: XLA's own count of that, which has the body of a loop once and the memory on a
        TPU's chip too; None without one.
      teacher_bytes: size of a teacher's parameters on one device.
      collectives: what the devices send to one another in a step.
      unexpected: what of that is neither a gradient nor a parameter, with its source.
    """

    name: str
    images: int
    mesh: dict[str, int]
    state_bytes: int
    model_flops: float
    arithmetic: arithmetic.Arithmetic
    seconds: float
    refusal: str | None = None
    memory: Memory | None = None
    bytes_moved: int = 0
    xla_bytes: float | None = None
    teacher_bytes: int = 0
    collectives: tuple[sent.Collective, ...] = ()
    unexpected: tuple[tuple[str, str], ...] = ()

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    @property
    def flops(self) -> float:
        """FLOPs of the matrix products on one device."""
        return self.arithmetic.flops / self.devices

    @property
    def bytes_sent(self) -> float:
        """The least bytes that one device sends to others in a step."""
        return sum(collective.bytes_sent for collective in self.collectives)

    def fits(self, available: float | None) -> bool | None:
        """Returns whether a device has the memory; None if that is not known.

        Args:
          available: memory of a device in bytes; None if it is not known.
        """
        if self.memory is None:
            return False
        return None if available is None else self.memory.total <= available


def trace(
    config: ml_collections.ConfigDict,
    model: ConViT,
    mesh: Mesh,
    steps_per_epoch: float,
    total_steps: int,
    teacher: Teacher | None = None,
) -> tuple[Any, TrainState, Any]:
    """Traces the real training step for the devices of a mesh.

    Returns:
      The traced step, and the shapes of its state and of a teacher's parameters, None without one.

    Raises:
      ValueError: if the number of devices does not divide the batch size, or if the teacher does
        not fit the model.
    """
    batch_size = config.train.batch_size
    sharding.check_batch_size(batch_size, config.train.accum_steps, mesh)
    distill = None if teacher is None else _fit(teacher, config, model, mesh)
    program = Program.make(config, model, mesh, steps_per_epoch, total_steps, distill)
    state = program.abstract_state
    shapes = {"image": (model.image_shape, "uint8"), "label": ((), "int32")}
    shapes["skipped"] = shapes["label"]
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.over_batch(mesh))
        for name, (shape, dtype) in shapes.items()
    }
    if distill is None:
        return program.jitted_step().trace(state, batch), state, None
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        distill.teacher.params,
        distill.shardings,
    )
    return program.jitted_step().trace(state, batch, params), state, params


def _fit(
    teacher: Teacher, config: ml_collections.ConfigDict, model: ConViT, mesh: Mesh
) -> Distillation:
    """Fits a teacher to a model whose data are not opened: the first classes are the teacher's."""
    names = teacher.class_names or tuple(map(str, range(teacher.num_classes)))
    if len(names) < model.num_classes:
        raise ValueError(
            f"distill.teacher: expected at least {model.num_classes:,} classes, as "
            f"model.num_classes, got {len(names):,} in {teacher.source}"
        )
    return distillation.fit(teacher, config, model, names[: model.num_classes], mesh)


def measure(
    name: str,
    config: ml_collections.ConfigDict,
    model: ConViT,
    mesh: Mesh,
    steps_per_epoch: float,
    total_steps: int,
    teacher: Teacher | None = None,
) -> Step:
    """Compiles the training step, which takes minutes at full size, and counts what it costs.

    Args:
      name: what differs from the user's configuration.
      config: the configuration.
      model: the model to train.
      mesh: the devices, which need not be there.
      steps_per_epoch: number of steps in an epoch, for the schedule.
      total_steps: number of steps of the whole run, for the schedule.
      teacher: the teacher of a distillation.

    Raises:
      ValueError: if the number of devices does not divide the batch size, or if the teacher does
        not fit the model.
    """
    traced, state, taught_by = trace(config, model, mesh, steps_per_epoch, total_steps, teacher)
    images = config.train.batch_size
    step = Step(
        name=name,
        images=images,
        mesh=dict(mesh.shape),
        state_bytes=_bytes_per_device(state),
        model_flops=images * training_flops(model),
        arithmetic=arithmetic.of_jaxpr(traced.jaxpr),
        seconds=0.0,
        teacher_bytes=_bytes_per_device(taught_by),
    )
    start = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(
            step, seconds=time.monotonic() - start, refusal=_reason(str(error))
        )
    seconds = time.monotonic() - start
    text = Compiled.parse(compiled.as_text())
    collectives = sent.find(text, step.devices)
    return dataclasses.replace(
        step,
        seconds=seconds,
        memory=Memory.of(compiled.memory_analysis()),
        bytes_moved=traffic.bytes_moved(text),
        xla_bytes=(compiled.cost_analysis() or {}).get("bytes accessed"),
        collectives=tuple(collectives),
        unexpected=tuple(
            sent.unexpected(collectives, sent.expected_sizes(state, model, taught_by))
        ),
    )


def _reason(error: str) -> str:
    """Returns what the compiler says about memory, without the details that follow."""
    found = re.search(r"Used \S+ of \S+ hbm", error)
    found = found or re.search(r"Ran out of memory.*?(?=\. |$)", error, re.MULTILINE)
    return found[0] if found else error


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def progress(text: str, every: float = _SAY_EVERY) -> Iterator[None]:
    """Logs a line every few seconds while the block runs: the text and the seconds so far."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            log.info("%s: %.0f s so far", text, time.monotonic() - start)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
