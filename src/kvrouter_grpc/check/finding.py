"""What a check comes to."""

from dataclasses import dataclass
from enum import IntEnum

from kvrouter_grpc.advice import Advice


class Severity(IntEnum):
    """How bad it is; the worst of all findings decides the exit code."""

    OK = 0  # checked, and as it should be
    NOTE = 1  # worth knowing, or could not be checked
    WARNING = 2  # works, but not as well as it could
    FAILURE = 3  # the router would not use the worker, or would route it wrongly


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        check: What was looked at, e.g. "replay".
        severity: How bad it is.
        seen: What was seen.
        fix: What to change; "" where nothing need be.
        rank: Data-parallel rank that it is about; None: the worker.
    """

    check: str
    severity: Severity
    seen: str
    fix: str = ""
    rank: int | None = None


def found(check: str, severity: Severity, advice: Advice, rank: int | None = None) -> Finding:
    """A finding whose sentence the running router says, too."""
    return Finding(check, severity, advice.seen, advice.fix, rank)
