"""Compiles the training step for TPU pods, on a machine without a TPU.

    python -m benchmarks.tpu_compile --config=configs/convit_b.py
    python -m benchmarks.tpu_compile --config=configs/convit_s.py --topology=v5e:4x4 --fsdp=1,16

The TPU's own compiler (pip install libtpu) compiles the whole step at its real size, ahead of time.
It tells how much of a device's memory the step needs and what the devices send to one another. The
command fails if the step does not fit, or if anything is sent other than gradients, the scalars of
the metrics and, if the state is split, the parameters. One program takes minutes to compile.

Any key of the configuration can be set, as for main.py: --config.train.batch_size=512. With
--config.model.unroll=12 (all layers), the memory that a step reads and writes is printed too;
without it the compiler would count the body of a loop only once. For a comparison with a DeiT of
the same heads and width, add

    --config.model.local_up_to_layer=0 --config.model.cls_pos_embed=True
    --config.model.qkv_bias=True
"""

from collections.abc import Iterator
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import time

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
import ml_collections

from convit_jax.cli import options
from convit_jax.model.network import ConViT
from convit_jax.parallel import sharding
from convit_jax.train import setup
from convit_jax.train.step import Program, TrainState

# Memory of a JAX device in GiB: cloud.google.com/tpu/docs, the page of each generation. A device is
# a chip, except on v2 and v3, where it is half a chip. The compiler reserves about 0.25 GiB of it.
_MEMORY = {
    "TPU v2": 8,
    "TPU v3": 16,
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
}
_STEPS_PER_EPOCH, _EPOCHS = 1251, 300  # for the schedule; the program does not depend on them

_MIB = 2**20
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\\w+"
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation: something that devices send to one another in a step.

    Attributes:
      kind: name of the operation, such as "all-reduce".
      arrays: type and number of elements of each whole array.
      turns: how often the operation runs in a step.
      source: where in the program it comes from.
    """

    kind: str
    arrays: tuple[tuple[str, int], ...]
    turns: int
    source: str


def find_collectives(hlo: str) -> list[Collective]:
    """Finds all collectives in the text of a compiled program, and counts the turns of loops."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        lines.append(line)

    def turns_of(condition: str) -> int:
        """Reads the turns of a scan from its condition `counter < constant`.

        Other loops count as one turn; in our programs they contain no collectives.
        """
        constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition]))
        return int(constants[0]) if len(constants) == 1 else 1

    def walk(name: str, turns: int) -> Iterator[tuple[str, Collective]]:
        for line in computations[name]:
            if match := re.search(rf" = (.*?) ({_KINDS})(-start)?\(", line):
                yield _read_collective(line, match[1], match[2], bool(match[3]), name, turns)
            if loop := re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                yield from walk(loop[2], turns * turns_of(loop[1]))
            for called in re.findall(r"(?:calls|_computations?)=\{?%?([\w.-]+)", line):
                yield from walk(called, turns)

    found: dict[str, Collective] = {}
    for channel, collective in walk(entry, 1):
        # A collective that overlaps with arithmetic appears once for each of its stages.
        if channel not in found or found[channel].turns < collective.turns:
            found[channel] = collective
    return list(found.values())


def _read_collective(
    line: str, types: str, kind: str, is_start: bool, computation: str, turns: int
) -> tuple[str, Collective]:
    """Returns the channel, which identifies a collective, and the collective."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    sizes = [(t, math.prod(int(n) for n in shape.split(",") if n)) for t, shape in arrays]
    if is_start and kind == "collective-permute":
        sizes = sizes[1:2]  # the types are (input, output, and two for synchronisation)
    elif is_start and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # the types are (inputs, outputs)
    if kind == "reduce-scatter":
        groups = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})", line)
        parts = int(groups[1]) if groups[1] else len(groups[2].split(","))
        sizes = [(t, n * parts) for t, n in sizes]
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # how TPU programs write it: each device keeps its part
    source = re.search(r'op_name="([^"]*)"', line)
    channel = re.search(r"channel_id=(\d+)", line)
    key = channel[1] if channel else line
    return key, Collective(kind, tuple(sizes), turns, source[1] if source else "")


def expected_sizes(state: TrainState, model: ConViT) -> dict[str, set[int]]:
    """Returns {kind: numbers of elements of the arrays that a step should send}.

    Gradients, of all layers or of one layer, are reduced. The gradient of a layer's positional
    attention is reduced too, before the gradients of its few parameters are computed from it. Split
    parameters are gathered. Their parts are also sent around a ring while they are multiplied or
    while their gradients are computed.
    """
    reduced, gathered, parts = {1}, set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        layers = leaf.shape[0] if path[0].key in ("gpsa_blocks", "blocks") else 1
        sizes = {leaf.size, leaf.size // layers}
        reduced |= sizes
        if not leaf.sharding.is_fully_replicated:
            gathered |= sizes
            part = math.prod(leaf.sharding.shard_shape(leaf.shape))
            parts |= {part, part // layers}
    rows, columns = model.grid
    reduced |= {model.num_heads * n**2 for n in (rows, columns, rows * columns)} | parts
    return {
        "all-reduce": reduced,
        "reduce-scatter": reduced,
        "all-gather": gathered,
        "collective-permute": parts,
    }


def unexpected(
    collectives: list[Collective], expected: dict[str, set[int]]
) -> list[tuple[str, str]]:
    """Returns what a step should not send: a list of (array, where it comes from)."""
    return [
        (f"{c.kind} of {dtype}[{size}]", c.source)
        for c in collectives
        for dtype, size in c.arrays
        if size not in expected.get(c.kind, set())
    ]


def lower(
    config: ml_collections.ConfigDict, model: ConViT, mesh: Mesh
) -> tuple[jax.stages.Lowered, TrainState]:
    """Lowers the real training step for the devices of a mesh; returns it and its state's shapes.

    Raises:
      ValueError: if the number of devices does not divide the batch size.
    """
    batch_size = config.train.batch_size
    sharding.check_batch_size(batch_size, config.train.accum_steps, mesh)
    total_steps = _EPOCHS * _STEPS_PER_EPOCH
    program = Program.make(config, model, mesh, _STEPS_PER_EPOCH, total_steps)
    state = program.abstract_state
    shapes = {"image": (model.image_shape, "uint8"), "label": ((), "int32")}
    shapes["skipped"] = shapes["label"]
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.over_batch(mesh))
        for name, (shape, dtype) in shapes.items()
    }
    return program.jitted_step().lower(state, batch), state


def report(config: ml_collections.ConfigDict, model: ConViT, name: str, mesh: Mesh) -> list[str]:
    """Compiles for one mesh, prints its rows of the table, and returns the problems found."""
    lowered, state = lower(config, model, mesh)
    parts = f"{mesh.shape['data']} x {mesh.shape['fsdp']}"
    images = config.train.batch_size // mesh.size
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    groups = (model.local_up_to_layer, model.depth - model.local_up_to_layer - 1)
    unrolled = model.unroll is True or model.unroll >= max(groups)
    memory = _MEMORY.get(mesh.devices.flat[0].device_kind, math.nan)
    row = f"{name:<10}{parts:>8}{images:>8}{held / _MIB:>10,.1f}"
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"Ran out of memory.*", str(error))
        print(f"{row}  {needs[0] if needs else error}", flush=True)
        return [
            f"{name}, {parts}: the step does not fit the memory; try --config.train.remat=block"
        ]
    seconds = time.perf_counter() - start

    stats = compiled.memory_analysis()
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    total = arguments + temporaries + stats.output_size_in_bytes - stats.alias_size_in_bytes
    total += stats.generated_code_size_in_bytes
    for part in (arguments, temporaries, total):
        row += f"{part / _MIB:>11,.1f}"
    accessed = f"{compiled.cost_analysis()['bytes accessed'] / _MIB:,.0f}" if unrolled else "-"
    print(f"{row}{memory * 1024:>8,}{accessed:>10}{seconds:>9.0f}", flush=True)
    collectives = find_collectives(compiled.as_text())
    for kind in sorted({c.kind for c in collectives}):
        those = [c for c in collectives if c.kind == kind]
        times = sum(c.turns for c in those)
        sent = {dtype: 0 for c in those for dtype, _ in c.arrays}
        for c in those:
            for dtype, size in c.arrays:
                sent[dtype] += c.turns * size * _BYTES.get(dtype, 1)
        amounts = ", ".join(f"{n / _MIB:,.1f} MiB {t}" for t, n in sent.items() if n >= 2**16)
        print(f"{'':<10}{kind}: {times} a step, {amounts or 'scalars'}", flush=True)

    problems = [
        f"{name}, {parts}: {what} is neither a gradient nor a parameter, from {source or 'unknown'}"
        for what, source in unexpected(collectives, expected_sizes(state, model))
    ]
    if total > memory * 1024 * _MIB:
        problems.append(f"{name}, {parts}: the step does not fit the memory")
    return problems


def make_topology(name: str) -> list[jax.Device]:
    """Returns the devices of a pod, to compile for.

    Args:
      name: GENERATION:CHIPS along each axis, such as v5e:2x4.

    Raises:
      ValueError: if the compiler does not know the pod.
    """
    # On v4 and v5p, JAX by default sees the two cores of a chip as one device.
    options = {"chip_config_name": "megacore"} if name.startswith(("v4", "v5p")) else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology: expected a pod such as v5e:2x4 or v4:2x2x8, got {name!r} ({error})"
        ) from error


def use_compiler_alone() -> None:
    """Sets up libtpu as a compiler only, so that nothing looks for a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("error: the TPU's compiler is missing: pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # The topology describes the pod. Without these variables libtpu complains that it finds none.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # for several compilers at once


def main() -> None:
    parser = options.make_parser("python -m benchmarks.tpu_compile", __doc__ or "")
    options.add_config(parser)
    parser.add_argument(
        "--topology",
        metavar="PODS",
        default="v5e:2x4,v4:2x2x8",
        help="pods to compile for, as GENERATION:CHIPS along each axis; default %(default)s",
    )
    parser.add_argument(
        "--fsdp",
        metavar="SIZES",
        default="1,8",
        help="numbers of devices over which the state is split; default %(default)s",
    )
    args, overrides = options.parse(parser, None)
    if args.config is None:
        parser.error("--config: expected one")
    use_compiler_alone()
    problems = []
    with options.report(ValueError):
        config = options.configuration(args.config, overrides)
        model = setup.make_model(config, backend="tpu")
        meshes = [
            (name, sharding.make_mesh(int(fsdp), make_topology(name)))
            for name in args.topology.split(",")
            for fsdp in args.fsdp.split(",")
        ]
        print(f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}, ", end="")
        print(f"{config.model.name}, global batch {config.train.batch_size}; MiB a device")
        header = f"{'':<10}{'mesh':>8}{'images':>8}{'state':>10}{'arguments':>11}{'temporary':>11}"
        print(f"{header}{'total':>11}{'of':>8}{'accessed':>10}{'seconds':>9}", flush=True)
        for name, mesh in meshes:
            problems += report(config, model, name, mesh)
    if problems:
        sys.exit("error: " + "\n".join(problems))
    print("Nothing is sent but gradients, scalars and, over several devices of fsdp, parameters.")


if __name__ == "__main__":
    main()
