"""What the file systems of both kinds of buckets have in common."""

import errno
from typing import Any

from fsspec.asyn import sync_wrapper

from convit_jax.storage.faults import BucketError, Fault, Mend, explain

PIECE = 16 * 2**20  # bytes of an upload that are sent again after a fault


class ObjectStore:
    """Methods in place of those of gcsfs and s3fs.

    Their own methods say after some errors that an object does not exist. A run whose folder seems
    not to exist would begin anew. Here a bucket that cannot be read raises an error.

    Attributes:
      mend: commands that help with the faults of this kind of bucket.
    """

    mend: Mend

    def explain(
        self: Any, name: str, fault: Fault, tries: int = 1, seconds: float | None = None
    ) -> BucketError:
        """Returns the error of a request of this account that is not tried again."""
        return explain(
            name, fault, account=self._account(), mend=self.mend, tries=tries, seconds=seconds
        )

    async def _put_file(self, *args: Any, **options: Any) -> None:
        options.setdefault("chunksize", PIECE)
        await super()._put_file(*args, **options)  # type: ignore[misc]

    async def _info(self: Any, path: str, *args: Any, **options: Any) -> dict[str, Any]:
        try:
            return await super()._info(path, *args, **options)  # type: ignore[misc]
        except FileNotFoundError:
            url = self.unstrip_protocol(self._strip_protocol(path))
            raise FileNotFoundError(errno.ENOENT, "no such object or folder", url) from None

    async def _kind(self: Any, path: str) -> str | None:
        """Returns "file" or "directory"; None if there is neither."""
        try:
            return (await self._info(path))["type"]
        except FileNotFoundError:
            return None

    async def _exists(self, path: str, **_: Any) -> bool:
        return await self._kind(path) is not None

    async def _isdir(self, path: str) -> bool:
        return await self._kind(path) == "directory"

    async def _isfile(self, path: str) -> bool:
        return await self._kind(path) == "file"

    exists = sync_wrapper(_exists)
    isdir = sync_wrapper(_isdir)
    isfile = sync_wrapper(_isfile)
