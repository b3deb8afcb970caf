"""Packages that only some uses need, and how to install them."""

from collections.abc import Iterator
import contextlib


class MissingExtraError(ModuleNotFoundError):
    """A package is missing. The message says which extra has it."""


@contextlib.contextmanager
def needed(extra: str, what: str) -> Iterator[None]:
    """Turns the error of a missing package into one that says how to install it.

    Args:
      extra: the group of packages in setup.cfg that has it.
      what: needs the package; begins the message.

    Raises:
      ModuleNotFoundError: if a package that is imported in the block is missing.
    """
    try:
        yield
    except MissingExtraError:  # of something that this needs, such as a bucket
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "convit_jax":
            raise
        raise MissingExtraError(
            f"{what} needs the package {package}: pip install 'convit-jax[{extra}]'",
            name=error.name,
        ) from None
