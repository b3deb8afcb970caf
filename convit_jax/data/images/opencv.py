"""OpenCV, set up for worker processes."""

import functools
from types import ModuleType


@functools.cache
def opencv() -> ModuleType:
    """Returns cv2 with its threads turned off: the worker processes already use every core."""
    import cv2

    cv2.setNumThreads(0)
    return cv2
