"""Runs Python programs as forks of one process that has imported the large packages.

Importing JAX, Flax, Orbax and what they need takes about as long as a short command itself.

    with commands.running(environment) as forks:
        subprocess.run([*forks.python, "main.py", "--help"])     # in a fork
        subprocess.run(["convit", "--help"], env={"PATH": forks.folder})

A fork has the working folder, environment, arguments and open streams of whoever starts it, and it
ends that process with its own exit status. The packages read some variables when they are imported.
Where one of these differs, the program runs in a new process instead.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile

# Of other packages only: those of this project are imported by each program, as by a user.
_PACKAGES = (
    "jax", "flax.linen", "flax.nnx", "optax", "orbax.checkpoint", "grain", "tensorboardX",
    "ml_collections", "PIL.Image", "safetensors.numpy", "tqdm",
)  # fmt: skip
# Variables that packages or Python itself read at the start.
_READ_AT_START = ("JAX_", "XLA_", "PYTHON", "OMP_", "OPENBLAS_")


@dataclasses.dataclass(frozen=True)
class Forks:
    """How to start programs.

    Attributes:
      python: words before the file of a program and its arguments.
      folder: a folder for $PATH, with `convit`.
    """

    python: tuple[str, ...]
    folder: str


@contextlib.contextmanager
def running(environment: dict[str, str], packages: Sequence[str] = _PACKAGES) -> Iterator[Forks]:
    """Starts the process that forks, with the environment that programs will have.

    Args:
      environment: all variables.
      packages: what the process imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        # Without the site's packages it starts in hundredths of a second.
        python = (sys.executable, "-IS", os.path.abspath(__file__), address)
        convit = pathlib.Path(folder, "convit")
        script = os.path.join(os.path.dirname(sys.executable), "convit")
        convit.write_text(f'#!/bin/sh\nexec {shlex.join([*python, script])} "$@"\n')
        convit.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(16)
            process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), *packages],
                env=environment,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        try:
            yield Forks(python, folder)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # and what is left of its programs
            process.wait()


def _serve(listener: socket.socket, packages: Sequence[str]) -> None:
    """Answers requests for ever. In a fork that runs a program, returns when it has run."""
    import gc
    import importlib

    for package in packages:
        importlib.import_module(package)
    gc.freeze()  # spares the collector the packages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks below
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        # This fork waits for the program, which is another one.
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, streams = _receive(connection)
        program = os.fork()
        if not program:
            connection.close()
            return _run(streams, **request)
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(program, 0)
        with contextlib.suppress(OSError):  # whoever asked may be gone
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    content, streams, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while not content.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:  # whoever asked is gone
            os._exit(0)
        content += more
    return json.loads(content), streams


def _run(streams: list[int], words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Makes this process a program."""
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)

    def read_at_start(variables) -> dict[str, str]:
        return {key: variables[key] for key in variables if key.startswith(_READ_AT_START)}

    if read_at_start(environment) != read_at_start(os.environ):
        os.execve(sys.executable, [sys.executable, *words], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(words)
    sys.path[0] = os.path.dirname(os.path.realpath(words[0]))
    runpy.run_path(words[0], run_name="__main__")


def _ask(address: str, words: list[str]) -> None:
    """Asks for a program, waits for it, and ends as it ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
        content = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [content], [0, 1, 2])
        connection.sendall(content[sent:])
        answer = connection.recv(16)
    if not answer:
        sys.exit("the process that forks has ended")
    status = int(answer)
    if status < 0:
        with contextlib.suppress(OSError):  # of SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    else:
        _ask(sys.argv[1], sys.argv[2:])
