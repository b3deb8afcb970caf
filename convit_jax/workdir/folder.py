"""The workdir, the folder of a run, and every path in it. No other module spells these names."""

import os
import secrets
import tempfile

from convit_jax.storage import as_path, is_bucket, refuse_pattern, write_text


class Workdir:
    """Paths in the folder of a run. Creating this object neither reads nor writes the disk.

    Attributes:
      path: the folder itself.
      config: configuration, as JSON.
      classes: names of the classes in the order of the logits, as JSON.
      data: number and hash of the images of each split, as JSON.
      lock: who trains in the folder, as JSON.
      starts: a JSON line for each start of the run.
      metrics: a JSON line for each report of metrics.
      tensorboard: folder of TensorBoard's event files.
      checkpoints: folder of checkpoints, with one folder for each step.
      weights: final weights, as safetensors.
      index: folder of indices of the data.
      fingerprints: hash of each image of each split, as a numpy archive.
      compilation_cache: folder of compiled programs.
      profile: folder of traces.
      evaluation: result of an evaluation, as JSON.
      predictions: a JSON line for each image of an evaluation.
      masking: result of masking parts of the final weights, in a study, as JSON.
      report: page about the run, as HTML.
    """

    def __init__(self, path: str | os.PathLike):
        """Names the paths in a folder.

        Args:
          path: a local folder, with "~" for the home folder, or gs://BUCKET/NAME, s3://BUCKET/NAME.

        Raises:
          ValueError: if `path` is a URL of another kind, or has a character of patterns.
          ModuleNotFoundError: if the package is missing that reads and writes such a bucket.
        """
        self.path = path = as_path(path)
        refuse_pattern(path, "--workdir")
        self.config = path / "config.json"
        self.classes = path / "classes.json"
        self.data = path / "data.json"
        self.lock = path / "lock.json"
        self.starts = path / "starts.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights.safetensors"
        self.index = path / "index"
        self.fingerprints = self.index / "fingerprints.npz"
        self.compilation_cache = path / "compilation_cache"
        self.profile = path / "profile"
        self.evaluation = path / "eval.json"
        self.predictions = path / "predictions.jsonl"
        self.masking = path / "masking" / "masking.json"
        self.report = path / "report.html"

    def __str__(self) -> str:
        return str(self.path)

    def check_writable(self) -> None:
        """Raises OSError if the folder cannot be written or made; leaves everything as it was."""
        if is_bucket(self.path):
            probe = self.path / f".writable-{secrets.token_hex(8)}"
            write_text(probe, "")
            probe.unlink()
            return
        exists = self.path
        while not exists.exists():
            exists = exists.parent
        with tempfile.TemporaryFile(dir=exists) as file:  # its OSError says why
            file.write(bytes(1 << 16))
