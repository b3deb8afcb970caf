"""Asks whether an object or folder exists; raises if the bucket cannot be read.

fsspec would answer no instead.
"""

import errno
from typing import Any

from fsspec.asyn import sync_wrapper


class Existence:
    """For file systems of fsspec, whose own methods answer no after some errors.

    A run whose folder seems not to exist would begin anew.
    """

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
