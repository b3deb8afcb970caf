"""OpenCV, set up for worker processes."""

import functools
from types import ModuleType


@functools.cache
def opencv() -> ModuleType:
    """cv2 without threads of its own: the loader's worker processes are the parallelism."""
    import cv2

    cv2.setNumThreads(0)
    return cv2
