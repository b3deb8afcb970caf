"""s3:// through s3fs, with retries and errors that name the object.

s3fs and botocore have retries of their own. They differ by operation and by kind of fault.
"""

import asyncio
import contextlib
import errno
import functools
import os
import re
from typing import Any

import aiohttp
import botocore.exceptions
import botocore.parsers
from fsspec.asyn import sync_wrapper
from fsspec.callbacks import DEFAULT_CALLBACK
import s3fs
from s3fs import errors

from convit_jax.storage import faults, retries
from convit_jax.storage.object_store import PIECE, ObjectStore

_MEND = faults.Mend(
    log_in="aws configure, or set AWS_PROFILE",
    allow="aws s3api put-bucket-policy --bucket {bucket} --policy file://POLICY.json",
    create="aws s3 mb s3://{bucket}",
)
_TIMEOUTS = (
    TimeoutError,
    botocore.exceptions.ConnectTimeoutError,
    botocore.exceptions.ReadTimeoutError,
)
_CUT_OFF = (
    aiohttp.ClientPayloadError,
    botocore.exceptions.FlexibleChecksumError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ResponseStreamingError,
    botocore.parsers.ResponseParserError,
)
_CONNECTION_ERRORS = (aiohttp.ClientError, botocore.exceptions.HTTPClientError, ConnectionError)
# Operations for which an answer of 404 says that there is no bucket, besides the listings.
_OF_BUCKETS = ("create_multipart_upload", "head_bucket", "put_object")
_PIECES = 4  # requests of a download at a time, each for PIECE bytes


class FileSystem(ObjectStore, s3fs.S3FileSystem):
    """S3, of Amazon or of another service."""

    mend = _MEND

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        silence = retries.patience().silence
        ours = {
            "connect_timeout": silence,
            "read_timeout": silence,
            "retries": {"total_max_attempts": 1},
        }
        return super()._prepare_config_kwargs() | ours | self.config_kwargs

    async def _call_s3(self, method: str, *args: Any, **options: Any) -> Any:
        bucket, key = options.get("Bucket", ""), options.get("Key", "")
        name = f"s3://{bucket}/{key or options.get('Prefix', '')}"

        if method == "abort_multipart_upload":  # the bucket's rules remove what is left
            return await self._abort(**options)

        async def once(tries: int) -> Any:
            try:
                answer = await self._send(method, *args, **options)
            except botocore.exceptions.ClientError as error:
                if _code(error) == "NotImplemented" and options.pop("IfNoneMatch", None):
                    return await once(tries)
                ended = method == "complete_multipart_upload" and _code(error) == "NoSuchUpload"
                if not ended or tries == 1:
                    raise
                # The answer to an earlier try was lost.
                return await self._send("head_object", Bucket=bucket, Key=key)
            return await _whole(answer) if method == "get_object" else answer

        def fault_of(error: Exception) -> faults.Fault | None:
            of_object = not (method.startswith("list_") or method in _OF_BUCKETS)
            if of_object and _code(error) in ("404", "NoSuchKey"):
                raise FileNotFoundError(errno.ENOENT, "no such object", name) from None
            if "IfNoneMatch" in options and _code(error) in ("412", "PreconditionFailed"):
                raise FileExistsError(errno.EEXIST, "the object exists", name) from None
            return _fault(error)

        body = options.get("Body")
        upload = len(body) if isinstance(body, (bytes, bytearray, memoryview)) else 0
        try:
            return await retries.attempt(
                once, fault_of, functools.partial(self.explain, name), name=name, upload=upload
            )
        except botocore.exceptions.ClientError as error:
            raise errors.translate_boto_error(error) from error

    async def _send(self, method: str, *args: Any, **options: Any) -> Any:
        """Makes one request."""
        await self.set_session()
        call = getattr(await self.get_s3(options.get("Bucket")), method)
        return await call(**self._get_s3_method_kwargs(call, *args, **options))

    async def _abort(self, **options: Any) -> None:
        with contextlib.suppress(Exception):
            await self._send("abort_multipart_upload", **options)

    call_s3 = sync_wrapper(_call_s3)  # what an open file calls

    async def _get_file(
        self, rpath: str, lpath: str, callback: Any = DEFAULT_CALLBACK, **_: Any
    ) -> None:
        if os.path.isdir(lpath):
            return
        size = (await self._info(rpath))["size"]
        callback.set_size(size)
        with open(lpath, "wb") as file:
            for start in range(0, size, _PIECES * PIECE):
                starts = range(start, min(size, start + _PIECES * PIECE), PIECE)
                pieces = [self._cat_file(rpath, start=at, end=at + PIECE) for at in starts]
                for piece in await asyncio.gather(*pieces):
                    callback.relative_update(file.write(piece))

    def _account(self) -> str:
        signer = getattr(self._s3, "_request_signer", None)
        credentials = getattr(signer, "_credentials", None)
        if credentials is None:
            return "an anonymous user"
        who = f"the access key {credentials.access_key} (from {credentials.method})"
        profile = os.environ.get("AWS_PROFILE")
        return f"{who} of AWS_PROFILE={profile}" if profile else who


class _Body:
    """The bytes of an object, all of them in memory."""

    def __init__(self, content: bytes):
        self._content = content

    async def read(self, count: int = -1) -> bytes:
        """Returns the next bytes, at most `count` if that is not negative."""
        end = len(self._content) if count < 0 else count
        some, self._content = self._content[:end], self._content[end:]
        return some

    def close(self) -> None:
        """Does nothing; s3fs closes what it has read."""


async def _whole(answer: dict[str, Any]) -> dict[str, Any]:
    """Reads the body of an answer while the request can be repeated, and checks its length."""
    async with answer["Body"] as stream:
        content = await stream.read()
    part = re.match(r"bytes (\d+)-(\d+)/", answer.get("ContentRange", ""))
    expected = int(part[2]) - int(part[1]) + 1 if part else answer.get("ContentLength")
    if expected is not None and len(content) != expected:
        raise botocore.exceptions.IncompleteReadError(
            actual_bytes=len(content), expected_bytes=expected
        )
    return answer | {"Body": _Body(content)}


def _code(error: Exception) -> str:
    """Returns the service's own name of an error; "" if the error is not an answer."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _fault(error: Exception) -> faults.Fault | None:
    """Returns what an error of botocore stands for; None if it is no fault of the service."""
    if isinstance(error, botocore.exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
        if _code(error) in ("SlowDown", "ConditionalRequestConflict"):
            status = 503
        if status in (409, 412, 416):
            return None
        return faults.answered(status, str(error.response.get("Error", {}).get("Message", "")))
    if isinstance(error, botocore.exceptions.NoCredentialsError):
        return faults.answered(401, str(error))
    if isinstance(error, _TIMEOUTS):
        return faults.SILENT
    if isinstance(error, _CUT_OFF):
        return faults.CUT_OFF
    if isinstance(error, _CONNECTION_ERRORS):
        return faults.broken(re.sub(r" (from|to) endpoint URL.*", "", str(error)))
    return None
