"""Runs the commands of a study one after another, each in a process of its own.

A run that has finished is not trained again, and one that was interrupted continues, so a study can
be stopped and started at any moment.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import logging
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from types import FrameType
from typing import Self, TextIO

import ml_collections

from convit_jax import recipe, saved_config
from convit_jax.data import fit
from convit_jax.parallel.signals import SIGNALS
from convit_jax.storage import is_bucket
from convit_jax.study.plans import Study
from convit_jax.train import same_run
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

# Keys that may change between two starts and yet change the result of a run.
_COUNTS = {"train.epochs", "data.epochs_scale", "data.skip_corrupt", "optim.lr"}
_LAST_LINES = 8  # of a failed run, shown


class Failed(RuntimeError):
    """A command of the study ended with an error."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One command of a study.

    Attributes:
      name: name of its log.
      words: the arguments of `convit`.
      result: the file that it writes last.
    """

    name: str
    words: tuple[str, ...]
    result: pathlib.Path


def jobs(study: Study, config: str, overrides: Sequence[str], folder: pathlib.Path) -> list[Job]:
    """Returns the commands of a study, in order: the training of each run, and its masking.

    Args:
      study: the study.
      config: value of --config, the base configuration.
      overrides: --config.KEY=VALUE flags for all runs of the study.
      folder: folder of the runs of this base configuration.
    """
    made = []
    for run in study.runs:
        keys = (f"--config={config}", *overrides, *run.flags)
        workdir = Workdir(folder / run.name)
        made.append(Job(run.name, ("train", *keys, f"--workdir={workdir}"), workdir.weights))
        if run.mask_first is not None:
            first = ",".join(map(str, run.mask_first))
            words = (
                "analyse", "masking", f"--weights={workdir}", "--checkpoint=newest",
                *((f"--first={first}",) if first else ()), f"--out={workdir.masking.parent}",
            )  # fmt: skip
            made.append(Job(f"{run.name}.masking", words, workdir.masking))
    return made


def command_text(words: Sequence[str]) -> str:
    """Returns the arguments of `convit` as a line for a shell."""
    return shlex.join(["convit", *words])


def check(workdir: Workdir, config: ml_collections.ConfigDict) -> None:
    """Checks that a run in a workdir, if there is one, is that of a configuration.

    Args:
      workdir: folder of the run.
      config: its configuration.

    Raises:
      ValueError: if the run there has another configuration; names the keys that differ.
    """
    found = same_run.config_of_run(workdir)
    if found is None:
        return
    config = config.copy_and_resolve_references()  # completed as the start of the run did
    config.distill.sha256 = config.distill.sha256 or found.distill.sha256
    fit.fit_normalisation(config, found.model.in_channels or 3)
    costs, asked = recipe.MAY_CHANGE - _COUNTS, saved_config.values(config)
    wrong = [
        text
        for name, text in saved_config.differences(found, config).items()
        if name not in costs and asked[name] is not None
    ]
    if wrong:
        raise ValueError(
            f"{workdir} holds a run with another configuration: choose another --out, delete that "
            "folder, or ask for the run's own values:\n  " + "\n  ".join(wrong)
        )


def run_all(study: Study, folder: pathlib.Path, todo: Sequence[Job]) -> bool:
    """Runs jobs one after another. Their output goes to NAME.log in `folder`.

    Args:
      study: the study.
      folder: folder of the runs.
      todo: the jobs that have not finished.

    Returns:
      Whether all have finished; False if a signal stopped the study.

    Raises:
      Failed: if a job ends with an error.
    """
    start = time.monotonic()
    with _Forwarding() as forwarding:
        for number, job in enumerate(todo):
            left = ""
            if number:
                seconds = (time.monotonic() - start) / number * (len(todo) - number)
                left = f", about {seconds / 60:.0f} min left"
            log.info("%s: %d of %d, %s%s", study.name, number + 1, len(todo), job.name, left)
            began = time.monotonic()
            with _output(folder / f"{job.name}.log") as file:
                file.write(command_text(job.words) + "\n")
                file.flush()
                begin = file.tell()
                status = forwarding.run([sys.executable, "-m", "convit_jax", *job.words], file)
                file.seek(begin)
                end = file.read().splitlines()[-_LAST_LINES:]
            if forwarding.stopped:
                return False
            if status or not job.result.exists():
                raise Failed(
                    f"{job.name} ended with status {status}. Remove the cause: the same command "
                    "continues the study. Its last lines:\n  " + "\n  ".join(end)
                )
            log.info("%s finished in %.0f s", job.name, time.monotonic() - began)
    return True


@contextlib.contextmanager
def _output(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens the file for the output of a run; a temporary one if the runs are in a bucket."""
    if is_bucket(path):
        with tempfile.TemporaryFile("w+", errors="replace") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", errors="replace") as file:
        yield file


class _Forwarding(contextlib.AbstractContextManager):
    """Runs processes, and passes the signals that stop this process on to the one that runs."""

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._pass_on)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN  # as nohup sets it
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], output: TextIO) -> int:
        """Runs a command to its end; returns its exit status."""
        # In a session of its own, so that Ctrl-C reaches it only once, from here.
        self._process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True
        )
        if self.stopped:  # a signal came while the process started
            self._process.terminate()
        return self._process.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
