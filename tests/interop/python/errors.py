"""What a refused call says: beside a code and a sentence, google.rpc details that a program can act on."""

from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2 as rpc
from grpc_status import rpc_status


@dataclass
class Refusal:
    """A refused call, decoded."""

    code: str
    message: str
    # ErrorInfo: the reason is stable, and made for programs; the sentence is not.
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    # BadRequest: fields of the request.
    fields: list[str] = field(default_factory=list)
    # PreconditionFailure: all that is in the way. Type is the name of a BlockerReason, subject a device.
    blockers: list[tuple[str, str]] = field(default_factory=list)
    # RetryInfo: when to call again. None where that is no use.
    retry_after_seconds: float | None = None

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.code}{reason}: {self.message}"


def decode(error: grpc.RpcError) -> Refusal:
    """Reads the details of a failed call."""
    refusal = Refusal(error.code().name, error.details() or "")
    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        info, bad, failed, retry = rpc.ErrorInfo(), rpc.BadRequest(), rpc.PreconditionFailure(), rpc.RetryInfo()
        if detail.Unpack(info):
            refusal.reason, refusal.domain, refusal.metadata = info.reason, info.domain, dict(info.metadata)
        elif detail.Unpack(bad):
            refusal.fields += [violation.field for violation in bad.field_violations]
        elif detail.Unpack(failed):
            refusal.blockers += [(violation.type, violation.subject) for violation in failed.violations]
        elif detail.Unpack(retry):
            refusal.retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
    return refusal
