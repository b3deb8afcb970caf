"""Forward passes and training steps, ours and timm's, made from a description.

The description (`Spec`) is plain data, so that another process can make the same contender.

    forward      inference: normalised images in, logits out
    step         training: forward pass with stochastic depth 0.1, cross entropy with soft labels,
                 backward pass, AdamW with DeiT's decay groups. Ours is the step of main.py without
                 erasing and mixing: it also normalises uint8 images, makes the soft labels,
                 computes the norm of the gradients and updates the schedule. timm's starts from
                 normalised images and soft labels, and uses torch.autocast for bfloat16.
    whole step   our step with erasing and mixing; timm has no such step
"""

from collections.abc import Callable
import dataclasses
import time
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peer
from convit_jax import ConViT, create_model, recipe
from convit_jax.parallel import sharding
from convit_jax.train.step import Program, TrainState

FORWARD, STEP, WHOLE_STEP = WORK = ("forward", "step", "whole step")
Result = TypeVar("Result")
OURS, TIMM, COMPILED = "ours", "timm", "timm, compiled"

# Options that turn a ConViT into a DeiT; only its attention and class token differ.
DEIT = {"local_up_to_layer": 0, "cls_pos_embed": True, "qkv_bias": True}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Describes a contender: who runs what.

    Attributes:
      who: OURS, TIMM or COMPILED (timm under torch.compile).
      what: one of WORK.
      variant: one of `convit_jax.VARIANTS`.
      options: options of `create_model` that replace the variant's; timm's model has their sizes.
      batch: number of images.
      dtype: type of the matrix products, "float32" or "bfloat16".
    """

    who: str
    what: str
    variant: str
    options: dict[str, Any]
    batch: int
    dtype: str = "float32"

    @property
    def model(self) -> ConViT:
        options = {"dtype": jnp.dtype(self.dtype), "drop_path": 0.1} | self.options
        return create_model(self.variant, **options)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A forward pass or training step that is ready to run.

    Attributes:
      launch: starts one pass; an accelerator may still be computing when it returns.
      wait: waits for what `launch` returned last.
      compile_seconds: time of tracing and compiling; for torch.compile, the time of the first call;
        None without a compiler.
      planned_bytes: memory that the compiler plans for temporaries and outputs; None if unknown.
      release: frees what a run leaves behind, such as gradients.
    """

    launch: Callable[[], Any]
    wait: Callable[[Any], object]
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    release: Callable[[], object] = lambda: None

    def run(self, passes: int = 1) -> None:
        """Runs passes one after the other and waits for the last."""
        for _ in range(passes - 1):
            self.launch()
        self.wait(self.launch())


def make(spec: Spec) -> Contender:
    """Makes the model and its inputs, and compiles.

    Raises:
      ValueError: if there is no such model.
      RuntimeError: if the model does not fit the memory, or the machine lacks something it needs.
    """
    if spec.who == OURS:
        return _our_forward(spec) if spec.what == FORWARD else _our_step(spec)
    return _timms(spec)


def attempt(work: Callable[[Spec], Result], spec: Spec) -> Result | str:
    """Returns work(spec), or the reason why it cannot run on this machine.

    The machine may lack memory, a C++ compiler or Triton for torch.compile, or a kernel for its
    device. All of these raise ValueError or RuntimeError.
    """
    try:
        return work(spec)
    except (ValueError, RuntimeError) as error:
        return reason(error)


def reason(error: Exception) -> str:
    """Returns the type of an error and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def warmed(spec: Spec) -> Contender:
    """Makes a contender and runs it once."""
    contender = make(spec)
    contender.run()
    return contender


def _program(spec: Spec) -> Program:
    """Makes our training program for a spec."""
    config = recipe.get_config()
    config.train.batch_size = spec.batch
    if spec.what != WHOLE_STEP:
        config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    return Program.make(config, spec.model, sharding.make_mesh(), 1251, 300 * 1251)


def _state(program: Program) -> TrainState:
    """Makes a state of random values; initialising it would be one more program to compile."""
    state = program.abstract_state
    rng = np.random.default_rng(0)

    def random(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(0.02 * rng.standard_normal(x.shape, np.float32), x.sharding)

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)

    params = jax.tree.map(random, state.params)
    return jax.tree.map(zeros, state.replace(params=None)).replace(params=params)


def _compile(function, *arguments) -> tuple[Any, float, int]:
    """Compiles a jitted function; returns the program, the seconds taken and the bytes it plans."""
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds, plan = time.perf_counter() - start, compiled.memory_analysis()
    planned = plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return compiled, seconds, planned


def _our_forward(spec: Spec) -> Contender:
    program, model = _program(spec), spec.model
    params = _state(program).params
    images = np.random.default_rng(0).standard_normal((spec.batch, *model.image_shape), np.float32)
    images = sharding.put_batch({"image": images}, program.mesh)["image"]
    arguments = ({"params": params}, images)
    forward, seconds, planned = _compile(jax.jit(model.apply), *arguments)
    return Contender(lambda: forward(*arguments), jax.block_until_ready, seconds, planned)


def _our_step(spec: Spec) -> Contender:
    program, model = _program(spec), spec.model
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(spec.batch, *model.image_shape), dtype=np.uint8),
        "label": rng.integers(model.num_classes, size=spec.batch, dtype=np.int32),
        "skipped": np.zeros(spec.batch, np.int32),
    }
    batch = sharding.put_batch(batch, program.mesh)
    states = [_state(program)]
    step, seconds, planned = _compile(program.jitted_step(), states[0], batch)

    def launch() -> TrainState:
        state, _ = step(states.pop(), batch)
        states.append(state)
        return state

    return Contender(launch, jax.block_until_ready, seconds, planned)


def _timms(spec: Spec) -> Contender:
    _, torch = peer.import_timm()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = spec.model
    model = peer.like(sizes, drop_path_rate=sizes.drop_path).to(device)
    images = torch.randn(spec.batch, 3, *sizes.image_shape[:2], device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16")
    called = torch.compile(model) if spec.who == COMPILED else model
    if spec.what == FORWARD:

        def work() -> None:
            with torch.inference_mode(), autocast:
                called(images)
    else:
        model.train()
        work = _torch_step(model, called, images, sizes.num_classes, autocast)

    def wait(_: None) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    contender = Contender(work, wait, release=model.zero_grad)
    if spec.who != COMPILED:
        return contender
    start = time.perf_counter()
    contender.run()
    return dataclasses.replace(contender, compile_seconds=time.perf_counter() - start)


def _torch_step(model, called, images, num_classes: int, autocast) -> Callable[[], None]:
    """Returns a training step of a torch model; `called` is the model or its compiled form."""
    _, torch = peer.import_timm()
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import param_groups_weight_decay

    labels = torch.softmax(torch.randn(len(images), num_classes, device=images.device), dim=1)
    groups = param_groups_weight_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay()
    )
    optimizer, criterion = torch.optim.AdamW(groups, lr=1e-3), SoftTargetCrossEntropy()

    def work() -> None:
        optimizer.zero_grad()
        with autocast:
            logits = called(images)
        criterion(logits.float(), labels).backward()
        optimizer.step()

    return work
