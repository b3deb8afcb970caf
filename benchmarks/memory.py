"""Measures the peak memory of a forward pass or a training step, above that of the loaded model.

    python -m benchmarks.memory '{"who": "ours", "what": "forward", "variant": "convit_small",
        "options": {"image_size": 512}, "batch": 1}'

On a CPU, Linux counts the largest resident set of the process. The result is the peak during one
run less the resident set before it, when the model is loaded, its inputs are made and the program
is compiled. Each measurement has a fresh process, because memory is not always returned to the
system after use. glibc is told to return blocks larger than 128 KiB at once, so that a run cannot
reuse memory of earlier allocations unseen. The forward pass that is measured is the first of its
process, so what it keeps is counted (timm's ConViT keeps the relative positions). The training step
that is measured is the second, because torch's AdamW makes its state in the first.

On a GPU, the result is torch's own count, and for our models the compiler's plan.
"""

from collections.abc import Callable
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import re
import subprocess
import sys

from benchmarks import contenders, peer

_GLIBC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Measured peak memory, and the compiler's plan (None without a compiler), in bytes."""

    peak: int
    planned: int | None


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the largest resident set during a call less the one before it, in bytes.

    Raises:
      OSError: if the system has no /proc, that is, is not Linux.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before = _resident_peak()
    run()
    return _resident_peak() - before


def torch_peak_bytes(contender: contenders.Contender) -> int:
    """Returns what a pass of a torch model allocates on the GPU at its peak, above the model."""
    _, torch = peer.import_timm()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.run()
    return torch.cuda.max_memory_allocated() - before


def _resident_peak() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def in_fresh_process(spec: contenders.Spec) -> Memory | str:
    """Measures a spec in a fresh process; returns the reason as text if it cannot run there."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(dataclasses.asdict(spec))],
        cwd=pathlib.Path(__file__).parent.parent, env=os.environ | _GLIBC,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == -9:
        return "does not fit the memory"
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {spec} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result if isinstance(result, str) else Memory(**result)


def _measure(spec: contenders.Spec) -> Memory:
    contender = (contenders.make if spec.what == contenders.FORWARD else contenders.warmed)(spec)
    contender.release()
    if spec.who == contenders.OURS:
        import jax

        if jax.default_backend() != "cpu":
            return Memory(contender.planned_bytes, contender.planned_bytes)
    else:
        _, torch = peer.import_timm()
        if torch.cuda.is_available():
            return Memory(torch_peak_bytes(contender), None)
    return Memory(peak_bytes(contender.run), contender.planned_bytes)


def main() -> None:
    fields = json.loads(sys.argv[1])
    # JSON stores tuples, such as image_size, as lists.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["options"].items()}
    result = contenders.attempt(_measure, contenders.Spec(**fields | {"options": options}))
    print(json.dumps(result if isinstance(result, str) else dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
