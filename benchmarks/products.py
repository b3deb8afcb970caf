"""Measures how much of a training step its matrix products take when they run alone.

    python -m benchmarks.products --variants convit_tiny convit_base --batch 8

Each repetition times the step of benchmarks.contenders once, and once every matrix product of its
layers as a program of its own: forward, for the gradient of the input, and for the gradient of the
weights. What is left of the step are norms, softmaxes, GELU, copies between layouts, the stacked
residuals of the scan, scores that are computed again, and the optimiser. The contraction of the
positional part, the patch embedding and the head are not among the products.

With --peer torch each repetition also times the same products in PyTorch, on the same numbers. The
last column is then the speed of ours over PyTorch's.
"""

import argparse
from collections.abc import Callable
import functools
from importlib import metadata
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command, contenders, machine, timing
from benchmarks.contenders import OURS, STEP, Spec
from convit_jax import VARIANTS, ConViT

# (name, einsum, shape of the first operand, shape of the second operand, times that a step has it)
Product = tuple[str, str, tuple[int, ...], tuple[int, ...], int]


def products(model: ConViT, batch: int) -> list[Product]:
    """Returns the matrix products of a training step, as (name, einsum, shapes, times).

    The last block computes its output for the class token alone. Its products with one token are
    left out.
    """
    width, heads = model.embed_dim, model.num_heads
    patches = model.grid[0] * model.grid[1]
    hidden = int(width * model.mlp_ratio)
    gpsa, plain = model.local_up_to_layer, model.depth - model.local_up_to_layer - 1
    found: list[Product] = []

    def linear(name: str, tokens: int, inputs: int, outputs: int, layers: int) -> None:
        x, w, y = (batch * tokens, inputs), (inputs, outputs), (batch * tokens, outputs)
        found.extend([
            (f"{name}, forward", "tk,kn->tn", x, w, layers),
            (f"{name}, input's gradient", "tn,kn->tk", y, w, layers),
            (f"{name}, weights' gradient", "tk,tn->kn", x, y, layers),
        ])  # fmt: skip

    for kind, tokens, layers in (("GPSA", patches, gpsa), ("plain", patches + 1, plain)):
        if not layers:
            continue
        linear(f"{kind} projections of the input", tokens, width, 3 * width, layers)
        linear(f"{kind} projection of the output", tokens, width, width, layers)
        linear(f"{kind} MLP, first", tokens, width, hidden, layers)
        linear(f"{kind} MLP, second", tokens, hidden, width, layers)
        head = (batch, tokens, heads, width // heads)
        scores = (batch, heads, tokens, tokens)
        # Scores and their average of the values, and the gradients of q, k, v and of the map.
        found.append((f"{kind} scores", "bnhk,bmhk->bhnm", head, head, 2 * layers))
        found.append((f"{kind} averages", "bhnm,bmhk->bnhk", scores, head, 2 * layers))
        found.append((f"{kind} averages, transposed", "bhnm,bnhk->bmhk", scores, head, 2 * layers))
    linear("last block, projections of the input", patches + 1, width, 3 * width, 1)
    return found


def _ready(product: Product, dtype: str) -> tuple[Callable[[], object], float]:
    """Compiles a product and runs it once; returns a function that runs it, and its FLOPs."""
    _, einsum, *shapes, times = product
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]
    program = jax.jit(functools.partial(jnp.einsum, einsum)).lower(*operands).compile()
    axes = dict(zip(einsum.replace(",", "").split("->")[0], shapes[0] + shapes[1], strict=True))

    def run() -> None:
        for _ in range(times):
            result = program(*operands)
        result.block_until_ready()

    run()
    return run, 2.0 * times * np.prod([float(size) for size in axes.values()])


def _ready_in_torch(product: Product, dtype: str) -> Callable[[], object]:
    """Returns a function that runs the product in PyTorch; runs it once."""
    import torch

    _, einsum, *shapes, times = product
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    operands = [torch.from_numpy(array).to(getattr(torch, dtype)) for array in arrays]

    def run() -> object:
        for _ in range(times):
            result = torch.einsum(einsum, *operands)
        return result

    run()
    return run


def report(flags: argparse.Namespace, variant: str) -> None:
    """Prints the rows of a variant: each product, their sum, and the step."""
    options = dict(flags.options)
    spec = Spec(OURS, STEP, variant, options, flags.batch, flags.dtype)
    step = contenders.warmed(spec)
    made = {p[0]: _ready(p, flags.dtype) for p in products(spec.model, flags.batch)}
    runs = {"step": step.run} | {name: run for name, (run, _) in made.items()}
    if flags.peer == "torch":
        for product in products(spec.model, flags.batch):
            runs["torch", product[0]] = _ready_in_torch(product, flags.dtype)
    seconds = timing.measure(runs, flags.repetitions)
    whole = seconds.pop("step")
    theirs = {name: seconds.pop(("torch", name)) for name in made if ("torch", name) in seconds}
    alone = np.sum([*seconds.values()], axis=0)
    work = sum(flops for _, flops in made.values())
    print(f"\n{variant}, {flags.batch} images")
    for name, (_, flops) in made.items():
        median = float(np.median(seconds[name]))
        row = f"  {name:<54}{median * 1e3:>9.1f} ms{flops / median / 1e9:>8.0f} GFLOP/s"
        if name in theirs:
            row += f"    {timing.speed_ratio(seconds[name], theirs[name])}"
        print(row)
    sums = [("all products, alone", alone), ("the step", whole)]
    if theirs:
        sums.insert(1, ("all products, alone, in PyTorch", np.sum([*theirs.values()], axis=0)))
    for name, times in sums:
        median = float(np.median(times))
        print(f"  {name:<54}{median * 1e3:>9.1f} ms{work / median / 1e9:>8.0f} GFLOP/s")
    print(f"  step / products: {timing.speed_ratio(alone, whole)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.products",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="models to measure "
        "(default: convit_tiny convit_base)", default=["convit_tiny", "convit_base"])  # fmt: skip
    add("--batch", type=int, default=8, help="images of a step (default: 8)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="type of the products (default: float32)")  # fmt: skip
    add("--peer", choices=["none", "torch"], default="none",
        help="library whose products to time too (default: none)")  # fmt: skip
    add("--options", nargs="*", type=command.option, default=[], metavar="KEY=VALUE",
        help="options of create_model (default: the model's defaults)")  # fmt: skip
    add("--repetitions", type=int, default=7, help="measurements of each time (default: 7)")
    flags = parser.parse_args(arguments)
    machine.set_up()
    versions = machine.versions(with_peer=False)
    if flags.peer == "torch":
        versions += f", torch {metadata.version('torch')}"
    print(f"{time.strftime('%Y-%m-%d')}, {machine.device()}, {flags.dtype}, {versions}")
    for variant in flags.variants:
        report(flags, variant)


if __name__ == "__main__":
    main()
