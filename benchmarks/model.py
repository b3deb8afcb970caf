"""Forward passes beside timm's, in one process, turn by turn.

    python -m benchmarks.model --variants convit_tiny convit_small --batch 8

The same weights on both sides (timm's initialisation), float32, images of 224 x 224 pixels; timm
eager. The speed of a machine wanders, so each repetition times every contender once and the ratio
is taken repetition by repetition.
"""

import argparse
import functools
import time

import jax
import jaxlib
import numpy as np

from benchmarks import peer
from convit_jax import create_model, from_torch


def contenders(name: str, batch: int) -> dict:
    """name -> a function that runs one forward pass and waits for it."""
    _, torch = peer.import_timm()
    theirs = peer.make(name)
    images = np.random.default_rng(0).standard_normal((batch, 224, 224, 3), np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    variables = jax.device_put({"params": from_torch(theirs.state_dict())})
    images = jax.device_put(images)

    def run_timm() -> None:
        with torch.inference_mode():
            theirs(tensor)

    def run_ours(forward) -> None:
        forward(variables, images).block_until_ready()

    runs = {"timm": run_timm}
    for positional in ("blend", "contract") if name.startswith("convit") else ("blend",):
        forward = jax.jit(create_model(name, positional=positional).apply)
        runs[f"ours, {positional}"] = functools.partial(run_ours, forward)
    return runs


def measure(runs: dict, repetitions: int) -> dict[str, np.ndarray]:
    """Seconds of every repetition; the first, which compiles, is left out."""
    times = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", choices=peer.NAMES, metavar="NAME", default=["convit_small"],
        help=f"of {', '.join(peer.NAMES)} (default: convit_small)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="images a pass (default: 8)")
    parser.add_argument("--repetitions", type=int, default=15, help="(default: 15)")
    args = parser.parse_args()

    timm, torch = peer.import_timm()
    print(
        f"timm {timm.__version__}, torch {torch.__version__}, jaxlib {jaxlib.__version__}, ", end=""
    )
    print(f"{torch.get_num_threads()} threads")
    print(f"{'variant':<18}{'':<16}{'images/s':>9}{'ours / timm: median (quartiles)':>34}")
    for name in args.variants:
        times = measure(contenders(name, args.batch), args.repetitions)
        for who, seconds in times.items():
            low, median, high = np.percentile(times["timm"] / seconds, [25, 50, 75])
            ratio = "" if who == "timm" else f"{median:.2f} ({low:.2f} to {high:.2f})"
            print(f"{name:<18}{who:<16}{args.batch / np.median(seconds):>9.1f}{ratio:>34}")


if __name__ == "__main__":
    main()
