"""gs:// through gcsfs, with retries, checked lengths, and errors that name the object.

gcsfs has retries of its own. They end after half a minute, log tracebacks, and do not notice an
answer that never comes or that is too short.
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
import contextlib
import errno
import functools
import inspect
import json
import os
import re
from typing import Any
import urllib.parse

import aiohttp
from fsspec import asyn
from gcsfs import core, retry
import google.auth.exceptions
import google_crc32c
import requests

from convit_jax.storage import faults, retries
from convit_jax.storage.object_store import ObjectStore

_MEND = faults.Mend(
    log_in="gcloud auth application-default login",
    allow="gcloud storage buckets add-iam-policy-binding gs://{bucket} "
    "--member=serviceAccount:NAME --role=roles/storage.objectAdmin",
    create="gcloud storage buckets create gs://{bucket}",
)
_CONNECTION_ERRORS = (
    aiohttp.ClientError,
    google.auth.exceptions.TransportError,
    requests.RequestException,
    ConnectionError,
)
_DELETIONS = 16  # requests at a time
_EMPTY: tuple = (204, {}, None, b"")  # an answer without content

# The functions of gcsfs without its decorator, which repeats them.
_request_once = inspect.unwrap(core.GCSFileSystem._request)
_get_file_once = inspect.unwrap(core.GCSFileSystem._get_file_request)


class FileSystem(ObjectStore, core.GCSFileSystem):
    """Google Cloud Storage."""

    mend = _MEND

    def __init__(self, *args: Any, **options: Any):
        silence = retries.patience().silence
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
        options.setdefault("requests_timeout", timeout)
        super().__init__(*args, **options)

    async def _request(self, method: str, path: str, *args: Any, **options: Any) -> Any:
        data = options.get("data")
        bucket, key = _target(path, args, data)
        deletes = method.upper() == "DELETE"
        if deletes and "upload_id=" in path:
            return await self._forget_upload(path)

        async def once(tries: int) -> Any:
            if tries > 1 and (answer := await self._arrived(path, options)):
                return answer
            try:
                answer = await _request_once(self, method, path, *args, **options)
            except FileNotFoundError:
                if deletes and key:  # as on S3: the answer to an earlier try may have been lost
                    return _EMPTY
                raise
            _check(*answer, is_content="alt=media" in path)
            return answer

        reads = bool(key) and (len(args) > 1 or method.upper() not in ("POST", "PUT"))
        upload = len(data) if isinstance(data, (bytes, bytearray, memoryview)) else 0
        name = key or options.get("prefix") or ""
        return await self._attempt(once, f"gs://{bucket}/{name}", reads, upload)

    async def _arrived(self, path: str, options: dict[str, Any]) -> Any:
        """Asks how much of an upload has arrived; None if no byte of this piece has.

        gcsfs understands the answer, and continues from there.
        """
        headers = options.get("headers") or {}
        piece = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if "upload_id=" not in path or not piece:
            return None
        headers = {"Content-Range": f"bytes */{piece[2]}", "Content-Length": "0"}
        try:
            answer = await _request_once(self, "PUT", path, headers=headers)
        except FileNotFoundError:
            # The upload has ended: the last answer was lost, or the upload is too old.
            bucket, key = _target(path, (), None)
            object_ = await _request_once(self, "GET", "b/{}/o/{}", bucket, key)
            crc = json.loads(object_[3]).get("crc32c")
            if piece[1] == "0" and crc == _crc32c(options.get("data") or b""):
                return object_
            raise retry.HttpError({"code": 410, "message": "the upload has ended"}) from None
        if answer[0] != 308:
            return answer  # the upload is complete
        end = re.fullmatch(r"bytes=0-(\d+)", answer[1].get("Range", ""))
        count = int(end[1]) + 1 if end else 0
        is_some = count > int(piece[1]) and count % core.GCS_MIN_BLOCK_SIZE == 0
        return answer if is_some else None

    async def _forget_upload(self, path: str) -> Any:
        """Tells the service that an upload has failed. It finds out by itself after a week."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(retries.patience().silence):
                await _request_once(self, "DELETE", path)
        return _EMPTY

    async def _get_file_request(self, rpath: str, *args: Any, **options: Any) -> Any:
        async def once(tries: int) -> Any:
            return await _get_file_once(self, rpath, *args, **options)

        return await self._attempt(once, self.unstrip_protocol(rpath), True)

    async def _delete_files(self, files: list[str], batchsize: int) -> list[Any]:
        """Deletes each object with a request of its own, so that each is tried again by itself.

        gcsfs sends Google, but no emulator, batches of deletions. Their faults name no object.
        """
        return await asyn._run_coros_in_chunks(
            [self._rm_file(file) for file in files], batch_size=_DELETIONS, return_exceptions=True
        )

    async def _attempt(self, once: Any, name: str, needs_object: bool, upload: int = 0) -> Any:
        def fault_of(error: Exception) -> faults.Fault | None:
            if isinstance(error, FileNotFoundError) and needs_object:
                raise FileNotFoundError(errno.ENOENT, "no such object", name) from None
            if isinstance(error, retry.HttpError) and int(error.code or 0) == 412:
                raise FileExistsError(errno.EEXIST, "the object exists", name) from None
            return _fault(error)

        return await retries.attempt(
            once, fault_of, functools.partial(self.explain, name), name=name, upload=upload
        )

    def _account(self) -> str:
        credentials = self.credentials.credentials
        if credentials is None:
            return "an anonymous user"
        email = getattr(credentials, "service_account_email", None)
        who = f"the service account {email}" if email else "the user of gcloud's login"
        file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        return f"{who} (GOOGLE_APPLICATION_CREDENTIALS={file})" if file else who


def _target(path: str, args: Sequence[str], data: Any) -> tuple[str, str]:
    """Returns the bucket and the object that a request is for; "" if it is for no object."""
    if args:
        return args[0], args[1] if len(args) > 1 else ""
    url = urllib.parse.urlsplit(path)
    parts = re.search(r"(?:^|/)b/([^/]+)(?:/o(?:/([^/]+))?)?$", url.path)
    if not parts:
        return "", ""
    key = parts[2] or urllib.parse.parse_qs(url.query).get("name", [""])[0]
    if not key and isinstance(data, bytes):  # an upload in one request has its name in the body
        name = re.search(rb'"name": ("(?:[^"\\\\]|\\\\.)*")', data[:8192])
        key = json.loads(name[1]) if name else ""
    return parts[1], urllib.parse.unquote(key)


def _check(
    status: int, headers: Mapping[str, str], _: Any, content: bytes, *, is_content: bool
) -> None:
    """Raises a ChecksumError if an answer is not whole.

    The HTTP client has compared its length with Content-Length. Something between the service and
    this machine may have shortened both. With `is_content`, the answer is the content of an object,
    which may be anything; otherwise it is JSON of the service itself.
    """
    part = re.match(r"bytes (\d+)-(\d+)/", headers.get("Content-Range", ""))
    if status == 206 and part and len(content) != int(part[2]) - int(part[1]) + 1:
        raise retry.ChecksumError(f"{len(content)} bytes came for {part[0]}")
    is_json = status == 200 and "json" in headers.get("Content-Type", "")
    if is_json and not is_content and content.strip()[-1:] not in (b"", b"}", b"]"):
        raise retry.ChecksumError("the answer is cut off")
    hashes = re.search(r"crc32c=([^,\s]+)", headers.get("X-Goog-Hash", ""))
    stored_as = headers.get("X-Goog-Stored-Content-Encoding", "identity")
    if hashes and status == 200 and stored_as == "identity" and _crc32c(content) != hashes[1]:
        raise retry.ChecksumError("the bytes do not match their checksum")


def _crc32c(content: bytes | memoryview) -> str:
    """Returns a checksum as Google Cloud Storage writes it."""
    return base64.b64encode(google_crc32c.Checksum(bytes(content)).digest()).decode()


def _fault(error: Exception) -> faults.Fault | None:
    """Returns what an error of gcsfs stands for; None if it is no fault of the service."""
    if isinstance(error, FileNotFoundError):
        return faults.answered(404)
    if isinstance(error, retry.HttpError):
        status = int(error.code or 0)
        text = str(error.message).removesuffix(f", {error.code}")
        return None if status == 416 else faults.answered(status, text)
    if isinstance(error, retry.NonRetryableError):  # the token cannot be renewed
        return faults.answered(401, str(error.__cause__ or error))
    if isinstance(error, requests.exceptions.ProxyError):  # gcsfs raises it without a text
        return faults.answered(502)
    if isinstance(error, TimeoutError):
        return faults.SILENT
    if isinstance(error, (aiohttp.ClientPayloadError, retry.ChecksumError)):
        return faults.CUT_OFF
    if isinstance(error, _CONNECTION_ERRORS):
        return faults.broken(str(error) or type(error).__name__)
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")
    if forbidden or (isinstance(error, ValueError) and str(error).startswith("Bad Request")):
        return faults.answered(403 if forbidden else 400, str(error).partition("\n")[2])
    return None
