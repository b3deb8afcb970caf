"""Processes that act as one run, started on this machine for the tests."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import compiling
from runs import ROOT

# A shell's background job ignores SIGINT, and so does all that it starts: the tests may be one.
START = """
import logging, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np
logging.basicConfig(format="%(message)s", level=logging.WARNING)
log = logging.getLogger("convit_jax")
log.setLevel(logging.INFO)
import jax
from jax.experimental import multihost_utils
from convit_jax.parallel import processes
processes._LINGER = 1.0

def by_hand(**times):
    processes.initialize(sys.argv[1], 2, int(sys.argv[2]), **times)
"""


def free_port(start: int = 0) -> int:
    """Returns a free port; if `start` is given, the first one from there on."""
    for port in range(start, start + 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise RuntimeError("no free port")


def start(code: str, *args: object, devices: int = 1, **env: str) -> subprocess.Popen:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": compiling.flags(devices),
        **env,
    }
    return subprocess.Popen(
        [sys.executable, "-u", "-c", START + code, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_pair(code: str, *args: object, devices: int = 1) -> list[subprocess.Popen]:
    address = f"127.0.0.1:{free_port()}"
    return [start(code, address, process, *args, devices=devices) for process in (0, 1)]


def wait_for(process: subprocess.Popen, text: str, timeout: float = 1200) -> str:
    """Returns a process's output up to a line with a text; kills it if that takes too long."""
    lines = []
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if text in line:
                return "".join(lines)
    finally:
        timer.cancel()
    raise AssertionError(f"ended without {text!r}:\n{''.join(lines)}")


def finish(processes: list[subprocess.Popen], timeout: float = 1200) -> list[str]:
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
