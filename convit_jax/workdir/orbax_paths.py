"""Paths of checkpoints, as Orbax understands them on disk and in buckets."""

import functools
import logging
import os
import pathlib
from typing import Any

from convit_jax import storage
from convit_jax.storage import retries

log = logging.getLogger(__name__)


def for_orbax(path: pathlib.Path) -> pathlib.Path:
    """Returns an absolute path, and makes Orbax understand it.

    TensorStore, which writes the arrays, knows S3. Orbax passes it only local paths and gs://. So
    for s3:// one function of Orbax is replaced in this process: the one that describes the place of
    an array to TensorStore.

    Raises:
      OSError: if this version of Orbax cannot be made to understand s3://.
    """
    if storage.is_bucket(path):
        _limit_retries()
    if os.fspath(path).startswith("s3://"):
        _teach_s3()
    return storage.absolute(path)


def _limit_retries() -> None:
    """Makes TensorStore give up when other requests to buckets do; by itself it takes 15 minutes.

    The retries are part of the context in which Orbax opens arrays. Orbax has no option for it.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    times = retries.patience()
    limits = {
        "max_retries": times.tries(),
        "initial_delay": f"{times.first_wait}s",
        "max_delay": f"{times.longest_wait}s",
    }
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        context = getattr(tensorstore_utils, name, None)
        if context is None:
            _warn_of(name)
            continue
        context.update(gcs_request_retries=limits, s3_request_retries=limits)


@functools.cache
def _warn_of(name: str) -> None:
    """Logs, once in a process, that the retries of TensorStore cannot be limited."""
    log.warning(
        "this version of orbax-checkpoint has no %s: after faults of a bucket, TensorStore reads "
        "and writes checkpoints again for up to 15 minutes, whatever $%s says. 0.12.8 has it",
        name,
        retries.VARIABLE,
    )


@functools.cache
def _teach_s3() -> None:
    from orbax.checkpoint._src.serialization import tensorstore_utils

    original = getattr(tensorstore_utils, "build_kvstore_tspec", None)
    if original is None:
        raise OSError(
            "s3://: expected a version of orbax-checkpoint that can be made to write there, such "
            "as 0.12.8; this one cannot. Use gs:// or a local folder, or install that version"
        )

    def build(directory: str, *args: Any, **options: Any) -> dict[str, Any]:
        if not directory.startswith("s3://"):
            return original(directory, *args, **options)
        as_gcs = "gs://" + directory.removeprefix("s3://")
        return _of_s3(original(as_gcs, *args, **options))

    tensorstore_utils.build_kvstore_tspec = build


def _of_s3(spec: Any) -> Any:
    """Returns a description of a place with TensorStore's driver of GCS replaced by S3's."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        return spec | {"driver": "s3"} | _s3_service()
    return {key: _of_s3(value) for key, value in spec.items()}


@functools.cache
def _s3_service() -> dict[str, Any]:
    """Returns what TensorStore has to know about the S3 service that s3fs uses.

    s3fs takes the endpoint from $AWS_ENDPOINT_URL, AWS's files or fsspec's. TensorStore knows none
    of these, so it would write to another service.
    """
    import fsspec

    service: dict[str, Any] = {}
    client = fsspec.filesystem("s3").s3.meta
    if ".amazonaws.com" not in client.endpoint_url:
        service = {"endpoint": client.endpoint_url, "aws_region": client.region_name}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Otherwise TensorStore also looks for AWS's files, and logs errors if there are none.
        service["aws_credentials"] = {"type": "environment"}
    return service
