"""The most memory that a forward pass or a training step takes, above the loaded model.

    python -m benchmarks.memory '{"who": "ours", "what": "forward", "variant": "convit_small",
        "options": {"image_size": 512}, "batch": 1}'

On a CPU: the largest resident set during one run, less that with the model loaded, its inputs made
and the program compiled, which Linux counts for us. Each is measured in a fresh process, for memory
that was used once does not always go back; and glibc is told to give back at once what is larger
than 128 KiB, so that nothing is hidden in what an earlier allocation left. A forward pass is the
process's first, and counts what it keeps (timm's ConViT keeps the relative positions). A step is
the second: torch's AdamW makes its state in the first.

On a GPU: torch's own count, and for ours the compiler's plan.
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
    """In bytes: what was taken, and what the compiler had planned, if there is one."""

    peak: int
    planned: int | None


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest resident set during a call, less that before it, in bytes.

    Raises:
      OSError: where there is no /proc of Linux.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size again
    before = _resident_peak()
    run()
    return _resident_peak() - before


def _resident_peak() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def in_fresh_process(spec: contenders.Spec) -> Memory | str:
    """Measures in a process of its own; or says why there is nothing to measure."""
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
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.run()
            return Memory(torch.cuda.max_memory_allocated() - before, None)
    return Memory(peak_bytes(contender.run), contender.planned_bytes)


def main() -> None:
    fields = json.loads(sys.argv[1])
    # JSON has lists for the tuples of image_size and the like.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["options"].items()}
    result = contenders.attempt(_measure, contenders.Spec(**fields | {"options": options}))
    print(json.dumps(result if isinstance(result, str) else dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
