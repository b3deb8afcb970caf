"""XLA flags for the tests, which compile far longer than they compute.

What the tests look at does not change: fusions, collectives and memory are the work of XLA's own
passes, before code is generated. `.ci/run` also runs the README's command, with XLA's defaults.
"""

import importlib.metadata

# LLVM's optimisation takes two thirds of the time to compile.
QUICK = "--xla_backend_optimization_level=0"
# Code in several parts, for several cores, takes a fifth more CPU time to compile. The tests occupy
# all cores as it is.
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
# The older code generator for fusions takes half of the rest. Later versions have lost it, and end
# the process at a flag that they do not know.
if importlib.metadata.version("jax").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def flags(devices: int = 1) -> str:
    """Returns the value of $XLA_FLAGS for a number of CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"
