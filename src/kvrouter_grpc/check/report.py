"""The findings of a check as a table and as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvrouter_grpc.check.finding import Finding, Severity

_STYLES = {Severity.OK: "green", Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.FAILURE: "bold red"}
_EXIT_CODES = {Severity.OK: 0, Severity.NOTE: 0, Severity.WARNING: 1, Severity.FAILURE: 2}


class WorkerReport(NamedTuple):
    """One worker and what was found; the fleet as a whole has no url."""

    name: str
    url: str
    findings: Sequence[Finding]


class Report:
    """What a check of the fleet came to."""

    def __init__(self, workers: Sequence[WorkerReport]) -> None:
        self.workers = workers

    @property
    def worst(self) -> Severity:
        """The severity of the worst finding."""
        return max((each.severity for worker in self.workers for each in worker.findings), default=Severity.OK)

    @property
    def exit_code(self) -> int:
        """0 nothing to do, 1 warnings, 2 failures: as monitoring plug-ins have it."""
        return _EXIT_CODES[self.worst]

    def problems(self) -> "Report":
        """The report without what is as it should be."""
        return Report(
            [
                worker._replace(findings=[each for each in worker.findings if each.severity > Severity.NOTE])
                for worker in self.workers
            ]
        )

    def json(self) -> bytes:
        """The report as one JSON object; see docs/check.md."""
        return msgspec.json.format(
            msgspec.json.encode({"worst": self.worst.name.lower(), "workers": [_plain(each) for each in self.workers]})
        )

    def table(self) -> RenderableType:
        """The report for people."""
        table = Table(header_style="bold", expand=False)
        for column in ("worker", "check", "", "seen", "fix"):
            table.add_column(column, overflow="fold")
        for worker in self.workers:
            rows = _rows(worker.findings)
            for number, (check, severity, seen, fix) in enumerate(rows):
                table.add_row(
                    # Names and texts of workers are no markup.
                    Text("" if number else worker.name, "bold"),
                    Text(check),
                    Text(severity.name.lower(), _STYLES[severity]),
                    Text(seen),
                    Text(fix),
                    end_section=number == len(rows) - 1,
                )
        return Group(table, self._verdict())

    def _verdict(self) -> Text:
        counts = Counter(each.severity for worker in self.workers for each in worker.findings)
        told = ", ".join(_counted(counts[severity], severity) for severity in reversed(Severity))
        return Text(told, _STYLES[self.worst])


def _rows(findings: Sequence[Finding]) -> list[tuple[str, Severity, str, str]]:
    """What needs attention, a row each, and all that is well in one; equal findings of several ranks are one."""
    merged: dict[tuple[str, Severity, str, str], list[int]] = {}
    for each in findings:
        ranks = merged.setdefault((each.check, each.severity, each.seen, each.fix), [])
        if each.rank is not None:
            ranks.append(each.rank)
    well = "; ".join(f"{check}: {seen}" for check, severity, seen, _ in merged if severity is Severity.OK)
    rows = [("", Severity.OK, well, "")] if well else []
    rows += [
        (f"{check} [{', '.join(map(str, ranks))}]" if ranks else check, severity, seen, fix)
        for (check, severity, seen, fix), ranks in merged.items()
        if severity is not Severity.OK
    ]
    return rows


def _counted(count: int, severity: Severity) -> str:
    name = severity.name.lower()
    return f"{count} {name}" if count == 1 or severity is Severity.OK else f"{count} {name}s"


def _plain(worker: WorkerReport) -> dict[str, Any]:
    return {
        "name": worker.name,
        "url": worker.url,
        "findings": [
            {
                "check": each.check,
                "severity": each.severity.name.lower(),
                "rank": each.rank,
                "seen": each.seen,
                "fix": each.fix,
            }
            for each in worker.findings
        ],
    }
