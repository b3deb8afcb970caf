"""Time and memory of converting weights; each conversion runs in a process of its own.

    python -m benchmarks.conversion --variant convit_base_plus

The weights are timm's own initialisation, saved by torch.save and as safetensors in a temporary
folder. The time is that of the command; the start of Python and the imports are given in a column
of their own. The memory is the peak of the process, mapped files included. It is also given as the
part above the memory that the process held after the imports.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import peer

_MAKE = """
import sys
from benchmarks import peer
_, torch = peer.import_timm()
import safetensors.torch
state_dict = peer.make(sys.argv[1]).state_dict()
torch.save(state_dict, sys.argv[2])
safetensors.torch.save_file(state_dict, sys.argv[3])
"""

_CONVERT = """
import time
start = time.perf_counter()
import json, logging, resource, sys
import safetensors.numpy
from convit_jax.cli import convert
if sys.argv[2].endswith(".pth"):
    import torch
import jax
jax.devices()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
imported, base = time.perf_counter() - start, peak()
start = time.perf_counter()
convert.main(sys.argv[1:])
seconds = time.perf_counter() - start
print(json.dumps({"imports": imported, "seconds": seconds, "base": base, "peak": peak()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="convit_base_plus", choices=peer.NAMES)
    variant = parser.parse_args().variant
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        pth, safetensors = folder / "theirs.pth", folder / "theirs.safetensors"
        subprocess.run([sys.executable, "-c", _MAKE, variant, pth, safetensors], check=True)
        size = pth.stat().st_size
        print(f"{variant}, {size / 1e6:.0f} MB")
        print(f"{'':28}{'s':>6}{'imports, s':>12}{'peak, MB':>10}{'above imports, MB':>19}"
              f"{'/ file':>8}")  # fmt: skip
        export = folder / "export.safetensors"
        for source, destination in (
            (pth, export),
            (safetensors, export),
            (export, folder / "back.pth"),
        ):
            command = [sys.executable, "-c", _CONVERT, source, destination]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            above = found["peak"] - found["base"]
            print(f"{f'{source.suffix} to {destination.suffix}':28}{found['seconds']:6.1f}"
                  f"{found['imports']:12.1f}{found['peak'] / 1e6:10.0f}{above / 1e6:19.0f}"
                  f"{above / size:8.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
