"""Times the prediction of one image by a new process, and the parts of that time.

    python -m benchmarks.predict --variants convit_tiny convit_base --repeats 5

The weights are random and are written once, before the measurements. "start and import" is the rest
of the process's time: the start of Python, all imports, and the exit. timm's model, without
torch.compile, is timed in the same way.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import peer

PARTS = ("start and import", "load", "compile", "run", "whole")

TIMM = """
import sys, time
from benchmarks import peer
timm, torch = peer.import_timm()
from PIL import Image
from safetensors.torch import load_file
name, weights, image = sys.argv[1:]
marks = [time.perf_counter()]
model = timm.create_model(name).eval()
model.load_state_dict(load_file(weights))
marks.append(time.perf_counter())
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    pixels = transform(Image.open(image).convert("RGB"))
    print(model(pixels[None]).softmax(-1).topk(5))
marks.append(time.perf_counter())
load, run = marks[1] - marks[0], marks[2] - marks[1]
print(f"load {load:.2f} s, compile 0.00 s, run {run:.2f} s", file=sys.stderr)
"""


def write_weights(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes timm's model with its own random initialisation as safetensors."""
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    save_file(peer.make(name).state_dict(), path)
    return path


def measure(command: list[str], env: dict[str, str]) -> list[float]:
    """Runs a process and returns the seconds of each of `PARTS`."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, check=True
    )
    whole = time.perf_counter() - start
    found = re.search(r"load ([\d.]+) s, compile ([\d.]+) s, run ([\d.]+) s", done.stderr)
    parts = [float(text) for text in found.groups()]
    return [whole - sum(parts), *parts, whole]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["convit_tiny", "convit_base"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    from sklearn import datasets

    image = pathlib.Path(datasets.__file__).with_name("images") / "flower.jpg"
    print(f"{'seconds, median':32}" + "".join(f"{part:>18}" for part in PARTS))
    with tempfile.TemporaryDirectory() as folder:
        cached = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for name in args.variants:
            weights = str(write_weights(name, pathlib.Path(folder)))
            ours = ["-m", "convit_jax", "predict", "--timing", "--weights", weights, str(image)]
            cases = {
                "timm": (["-c", TIMM, name, weights, str(image)], os.environ),
                "ours": (ours, os.environ),
                "ours, compiled before": (ours, cached),
            }
            for command, env in cases.values():
                measure(command, env)  # warms the system's cache of files and JAX's of programs
            times = {case: [] for case in cases}
            for _ in range(args.repeats):
                for case, (command, env) in cases.items():
                    times[case].append(measure(command, env))
            for case, rows in times.items():
                medians = [statistics.median(column) for column in zip(*rows, strict=True)]
                numbers = "".join(f"{value:18.2f}" for value in medians)
                print(f"{name + '  ' + case:32}{numbers}")


if __name__ == "__main__":
    main()
