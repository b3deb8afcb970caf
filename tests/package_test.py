"""What importing the package brings along."""

import json
import subprocess
import sys


def imported(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running the code."""
    code += "; import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return set(json.loads(output.stdout))


def test_importing_takes_jax_flax_and_numpy_only():
    added = imported("import convit_jax") - imported("import flax.linen, jax, numpy")
    assert added == {"convit_jax"}
