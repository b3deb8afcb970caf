"""Measures the cost of the training loop beside the bare step: data, logging and checkpoints.

    python -m benchmarks.overhead --batch 16 --block 8 --pairs 3

It trains convit_tiny on the machine's devices with the real training loop. After every few steps (a
block) the loop is paused until its last step is done and its checkpoint is written. Then the same
compiled step runs alone for as many steps (a bare block), on a batch that is already on the
devices. The time of a block of the loop is compared with the mean of the two bare blocks around it.
Worker processes continue to make batches during the pause, at most two each, which the loop then
finds ready.

    loop          data in memory; no line of metrics, no checkpoint
    logging       as loop, with a line of metrics after every step
    checkpoints   as loop, with a checkpoint in every block
    workers       as loop, but with JPEGs read by worker processes, see benchmarks.feeding
    all           as workers, with a line after every step and a checkpoint in every block

The last lines are the costs for a run that logs and saves as often as convit_jax/recipe.py says.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import feeding
from convit_jax import recipe
from convit_jax.data import arrays
from convit_jax.train import loop, setup
from convit_jax.workdir.folder import Workdir

VARIANTS = ("loop", "logging", "checkpoints", "workers", "all")
_NEVER = 10**9


class _Done(Exception):
    """Raised when enough has been measured."""


class InTurns:
    """Replaces the training step of the loop, and runs bare blocks between the loop's blocks.

    Attributes:
      looped: seconds of each block of the loop.
      alone: seconds of each bare block, one before every block of the loop and one after the last.
    """

    def __init__(self, step: Callable, checkpoints: pathlib.Path, block: int, pairs: int):
        self._step, self._checkpoints = step, checkpoints
        self._block, self._pairs = block, pairs
        # A block begins halfway between two checkpoints, so that its own is written before its end.
        self._until = max(2, block // 2)
        self._state: Any = None
        self._start = 0.0
        self.looped: list[float] = []
        self.alone: list[float] = []

    def __call__(self, state: Any, batch: dict[str, jax.Array]) -> Any:
        if not self._until:
            self._turn(state, batch)
            self._until = self._block
        self._until -= 1
        return self._step(state, batch)

    def _turn(self, state: Any, batch: dict[str, jax.Array]) -> None:
        jax.block_until_ready(state)
        while any(self._checkpoints.glob("*tmp*")):
            time.sleep(1e-3)
        if self._state is None:
            self._state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        else:
            self.looped.append(time.perf_counter() - self._start)
        start = time.perf_counter()
        for _ in range(self._block):
            self._state, _ = self._step(self._state, batch)
        jax.block_until_ready(self._state)
        self.alone.append(time.perf_counter() - start)
        if len(self.looped) == self._pairs:
            raise _Done
        self._start = time.perf_counter()


def keep(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image


def in_memory(run: setup.Run) -> setup.Run:
    """Returns the run with all its images replaced by one image that is already transformed."""
    image, count = run.train_chunks[0]["image"][0], len(run.train_chunks.source)
    source = arrays.ArraySource(
        images=np.broadcast_to(image, (count, *image.shape)),
        labels=np.arange(count) % run.program.model.num_classes,
        class_names=run.train_chunks.source.class_names,
        names=np.broadcast_to(np.bytes_(b"image"), count),
    )
    chunks = dataclasses.replace(run.train_chunks, source=source, transform=keep)
    return dataclasses.replace(run, train_chunks=chunks, workers=0)


def measure(variant: str, root: pathlib.Path, batch_size: int, block: int, pairs: int) -> InTurns:
    """Trains until `pairs` blocks of `block` steps are timed."""
    config = feeding.make_config(root, batch_size, 10 * block * pairs, workers=2)
    config.compilation_cache = str(root / "programs")
    config.train.log_every = 1 if variant in ("logging", "all") else _NEVER
    config.checkpoint.every = block if variant in ("checkpoints", "all") else _NEVER
    run = setup.prepare(config, Workdir(root / variant))
    setup.use_compilation_cache(run.config, run.workdir)
    if variant not in ("workers", "all"):
        run = in_memory(run)
    compiled_step, found = loop._compiled_step, []

    def in_turns(*args: Any) -> InTurns:
        step = compiled_step(*args)
        found.append(InTurns(step, run.workdir.checkpoints, block, pairs))
        return found[0]

    with mock.patch.object(loop, "_compiled_step", in_turns):
        try:
            loop.train(run)
        except _Done:
            return found[0]
    raise RuntimeError(f"{variant}: the run ended before {pairs} blocks of {block} steps")


def added(turns: InTurns, block: int) -> tuple[np.ndarray, float]:
    """Returns the share of time that the loop adds to each block, and seconds of a bare step."""
    alone = np.array(turns.alone)
    around = (alone[1:] + alone[:-1]) / 2
    return np.array(turns.looped) / around - 1, float(np.median(alone)) / block


def row(variant: str, turns: InTurns, block: int) -> str:
    """Returns a line of the table."""
    each, step = added(turns, block)
    blocks = ", ".join(f"{share:+.2%}" for share in each)
    return f"{variant:<12}{1e3 * step:>16.1f}{f'{np.median(each):+.2%} ({blocks})':>46}"


def by_default(found: dict[str, InTurns], block: int) -> Iterator[str]:
    """Yields a text each for lines of metrics and checkpoints: cost, and share at the defaults."""
    config = recipe.get_config()
    costs = {
        "logging": ("a line of metrics", 1, config.train.log_every),
        "checkpoints": ("a checkpoint", block, config.checkpoint.every),
    }
    for variant, (what, times, every) in costs.items():
        if {variant, "loop"} <= found.keys():
            (each, step), (others, _) = (added(found[v], block) for v in (variant, "loop"))
            share = (np.median(each) - np.median(others)) * times  # of a step
            yield f"{what}: {1e3 * share * step:.0f} ms, every {every} steps {share / every:+.3%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--batch", type=int, default=16, help="images of a step (default: 16)")
    parser.add_argument("--block", type=int, default=8, help="steps of a block (default: 8)")
    parser.add_argument("--pairs", type=int, default=3, help="blocks to time (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        feeding.write_folder(root / "images", feeding.IMAGES)
        print(f"{'':<12}{'ms a bare step':>16}{'added: median (all blocks)':>46}")
        found = {}
        for variant in args.variants:
            found[variant] = measure(variant, root, args.batch, args.block, args.pairs)
            print(row(variant, found[variant], args.block), flush=True)
    for line in by_default(found, args.block):
        print(line)


if __name__ == "__main__":
    main()
