"""A hash of weights that does not depend on the file they are in."""

from collections.abc import Mapping
import hashlib
from typing import Any

import numpy as np

from convit_jax.weights.state_dict import to_torch


def digest(params: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of parameters, in hexadecimal.

    It is the hash of name, shape and float32 numbers of every tensor, in the order of PyTorch's
    names. So the same weights have the same hash in every format.
    """
    total = hashlib.sha256()
    for name, array in sorted(to_torch(params).items()):
        total.update(f"{name} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array, "<f4").tobytes())
    return total.hexdigest()
