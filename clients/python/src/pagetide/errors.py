"""Errors of calls: one class a status code, with the reason and numbers that the service attached."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import grpc

from pagetide import rpc_status_pb2 as _rpc_status

_DETAILS_KEY = "grpc-status-details-bin"


class PageTideError(Exception):
    """A call that failed.

    `reason` is a word that programs act on ("STALE_EPOCH"), empty where the service gave none;
    `metadata` are its numbers; `retry_delay` is in seconds, None where the service asked for none.
    """

    code = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, reason: str = "", metadata: Optional[Mapping[str, str]] = None,
                 retry_delay: Optional[float] = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.code.name}{reason}: {self.message}"


class InvalidArgument(PageTideError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(PageTideError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(PageTideError):
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(PageTideError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class SequenceMoved(FailedPrecondition):
    """The sequence lives on another worker now: `address`. Sequence objects follow by themselves."""

    @property
    def address(self) -> str:
        return self.metadata.get("address", "")


class ResourceExhausted(PageTideError):
    """What was asked for does not fit now; `metadata` says needed, free and evictable."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Aborted(PageTideError):
    """A race was lost: repeat the whole operation."""

    code = grpc.StatusCode.ABORTED


class Unavailable(PageTideError):
    """The only error that is retried by itself; raised when the retries are used up."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(PageTideError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(PageTideError):
    code = grpc.StatusCode.CANCELLED


class DataLoss(PageTideError):
    code = grpc.StatusCode.DATA_LOSS


class PermissionDenied(PageTideError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(PageTideError):
    code = grpc.StatusCode.UNAUTHENTICATED


class Unimplemented(PageTideError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(PageTideError):
    code = grpc.StatusCode.INTERNAL


_CLASSES: dict[grpc.StatusCode, type[PageTideError]] = {
    c.code: c
    for c in (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted,
              Aborted, Unavailable, DeadlineExceeded, Cancelled, DataLoss, PermissionDenied,
              Unauthenticated, Unimplemented, Internal)
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def make_error(code: int, message: str, reason: str = "",
               metadata: Optional[Mapping[str, str]] = None,
               retry_delay: Optional[float] = None) -> PageTideError:
    """The error of a google.rpc.Code."""
    status = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    kind = _CLASSES.get(status, PageTideError)
    if reason == "SEQUENCE_MOVED":
        kind = SequenceMoved
    error = kind(message, reason, metadata, retry_delay)
    if type(error) is PageTideError:
        error.code = status
    return error


def from_rpc_error(error: Any) -> PageTideError:
    """The error of a failed call, of grpc's sync or asyncio API. Unknown details are left out."""
    reason = ""
    metadata: dict[str, str] = {}
    retry_delay: Optional[float] = None
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY:
            continue
        try:
            status = _rpc_status.Status.FromString(value)
            for detail in status.details:
                kind = detail.type_url.rsplit("/", 1)[-1]
                if kind == "google.rpc.ErrorInfo":
                    info = _rpc_status.ErrorInfo.FromString(detail.value)
                    reason = info.reason
                    metadata.update(info.metadata)
                elif kind == "google.rpc.RetryInfo":
                    delay = _rpc_status.RetryInfo.FromString(detail.value).retry_delay
                    retry_delay = delay.seconds + delay.nanos / 1e9
        except Exception:  # not by us, or cut on the way: code and message stand  # noqa: BLE001
            continue
    return make_error(error.code().value[0], error.details() or "", reason, metadata, retry_delay)
