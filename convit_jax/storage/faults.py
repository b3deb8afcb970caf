"""What goes wrong at a bucket, in words that say what was tried and what mends it."""

from typing import NamedTuple

# Environment variable with the seconds for which a request is tried again.
VARIABLE = "CONVIT_BUCKET_RETRY_SECONDS"


class BucketError(OSError):
    """A bucket cannot be used. The message names the object, and is one line.

    An object that does not exist is a FileNotFoundError instead.

    Attributes:
      status: HTTP status of the last answer; None if there was no answer.
    """

    status: int | None = None


def outage_behind(error: BaseException) -> BucketError | None:
    """Returns the BucketError that a library has turned into another error; None without one.

    An error that is a BucketError itself is returned.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, BucketError):
        cause = cause.__cause__ or cause.__context__
    return cause


class Fault(NamedTuple):
    """One failed request.

    Attributes:
      reason: what happened, such as "the service answered 503".
      status: HTTP status; None if there was no answer.
      most_tries: number of tries after which to give up; None if only time limits them.
    """

    reason: str
    status: int | None = None
    most_tries: int | None = None


class Mend(NamedTuple):
    """What a user of one kind of bucket does about its faults.

    Attributes:
      log_in: command that makes an account known.
      allow: command that lets an account use a bucket.
      create: command that makes a bucket.
    """

    log_in: str
    allow: str
    create: str


# Statuses after which the same request may succeed.
_TEMPORARY = {408, 429, *range(500, 600)} - {501, 505}
# 401 is tried three times: an expired token is renewed for the next try.
_REFUSED = {401: 3, 403: 1}


def answered(status: int, text: str = "") -> Fault:
    """Returns the fault of an answer with an error status."""
    text = " ".join(text.split())[:300]
    reason = f"the service answered {status}" + (f" ({text})" if text else "")
    most_tries = None if status in _TEMPORARY else _REFUSED.get(status, 1)
    return Fault(reason, status, most_tries)


SILENT = Fault("the service did not answer in time")
CUT_OFF = Fault("the answer was cut off")


def broken(text: str) -> Fault:
    """Returns the fault of a connection that failed before the answer."""
    return Fault(f"the connection failed ({' '.join(text.split())[:300]})")


def explain(
    name: str, fault: Fault, *, account: str, mend: Mend, tries: int, seconds: float | None
) -> BucketError:
    """Returns the error of a request that is not tried again.

    Args:
      name: URL of the object or of the bucket.
      fault: the last fault.
      account: who made the request.
      mend: commands for this kind of bucket.
      tries: number of requests.
      seconds: time since the first request; None if it is not known.
    """
    scheme, _, rest = name.partition("://")
    bucket = rest.partition("/")[0]
    if fault.status in _REFUSED:
        text = (
            f"{fault.reason} to {account}, which may not do this in the bucket {bucket}. Log in: "
            f"{mend.log_in}; or allow the account: {mend.allow.format(bucket=bucket)}"
        )
    elif fault.status == 404:
        text = (
            f"{account} sees no bucket {scheme}://{bucket}. Correct the name, or make the bucket: "
            f"{mend.create.format(bucket=bucket)}"
        )
    elif fault.most_tries is None:
        within = "" if seconds is None else f" in {seconds:.0f} s"
        text = (
            f"{fault.reason}; gave up after {tries} {'tries' if tries > 1 else 'try'}{within} "
            f"({VARIABLE} sets how long). Start the same command again when the service is back"
        )
    else:
        text = fault.reason
    error = BucketError(f"{name}: {text}")
    error.status = fault.status
    return error
