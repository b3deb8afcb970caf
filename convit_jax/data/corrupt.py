"""The errors for one image, and which failed reads of a file mean that the file is corrupt.

Only what is corrupt may be skipped. A mistake in the configuration, a missing folder or a machine
without memory raises other errors, which always stop the run.
"""

import errno
import os

from convit_jax import storage


class ImageError(ValueError):
    """Base of the errors about one image: corrupt, or unfit for the configuration."""


class CorruptImageError(ImageError):
    """Raised for an image that cannot be read or decoded."""


MEND = (  # advice for the user, after the name of the image
    "Mend the data, or set data.skip_corrupt=True: training then takes other images in "
    "place of corrupt ones, and evaluation leaves them out"
)
_UNREADABLE = (  # errors of one file; all others are of the machine, the network or the storage
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,  # missing, or a link that leads nowhere
    errno.EACCES, errno.EPERM,  # not ours to read
    errno.EIO, errno.EBADMSG, errno.EILSEQ,  # damaged on the disk
)  # fmt: skip


def read_file(path: str, root: str) -> bytes:
    """Returns the contents of an image file.

    Args:
      path: the file.
      root: a folder above it, which must exist.

    Raises:
      CorruptImageError: if this one file cannot be read, for instance a link to a missing file.
      OSError: if `root` is gone, or if the machine is at fault.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        if not os.path.isdir(root):
            raise FileNotFoundError(
                f"{root}: the folder of the images is gone; mount it or copy it back, and start "
                "again"
            ) from error
        what = error.strerror or str(error)
        if os.path.islink(path):
            what += f", a link to {os.readlink(path)}"
        raise CorruptImageError(f"{path}: cannot be read: {what}") from error


def read_object(path: str, root: str, ahead: storage.ReadAhead) -> bytes:
    """Returns the contents of an image file in a bucket.

    Args:
      path: the object.
      root: a folder above it, which must exist.
      ahead: reads it.

    Raises:
      CorruptImageError: if there is no such object.
      OSError: if `root` is gone, or if the bucket cannot be read.
    """
    try:
        return ahead.read(storage.Span(path))
    except FileNotFoundError as error:
        if not storage.is_folder(root):
            raise FileNotFoundError(
                f"{root}: the folder of the images is gone; copy it back, and start again"
            ) from error
        raise CorruptImageError(f"{path}: cannot be read: no such object") from error


def is_damage(error: OSError) -> bool:
    """Returns whether a failed read means damage on the disk, and not a missing file."""
    return error.errno in (errno.EIO, errno.EBADMSG, errno.EILSEQ)
