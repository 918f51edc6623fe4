"""Decisions as people read them."""

from collections.abc import Iterator
from datetime import datetime

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvrouter_grpc._gen import admin_pb2, common_pb2
from kvrouter_grpc.decisions.reader import Faults
from kvrouter_grpc.decisions.replay import Outcome


def explanation(decision: admin_pb2.Explanation) -> RenderableType:
    """The decision in a few lines, and a table of the workers."""
    return Group(_head(decision), _table(decision))


def _head(decision: admin_pb2.Explanation) -> RenderableType:
    at = datetime.fromtimestamp(decision.decided_at.ToNanoseconds() / 1e9).astimezone()
    request = decision.request_id or "a request without an id"
    size = decision.block_size or "unknown"
    temperature = f", temperature {decision.temperature:g}" if decision.temperature else ""
    output = f", {decision.expected_output_tokens} tokens of output" if decision.expected_output_tokens else ""
    prefilled = ", computed by another worker" if decision.prefilled else ""
    return Text.assemble(
        (request, "bold"),
        f" at {at:%Y-%m-%d %H:%M:%S.%f} on {decision.endpoint}\n",
        f"{decision.prompt_tokens} tokens, {decision.prompt_blocks} full blocks of {size}{prefilled}{output}; ",
        f"mode {decision.mode}, cost {decision.cost}{temperature}\n",
        "went to ",
        (_name(decision.worker_name, decision.dp_rank), "bold green"),
        f": {decision.reason}",
    )


def _table(decision: admin_pb2.Explanation) -> RenderableType:
    eligible = [each for each in decision.candidates if not each.dropped]
    # Terms that are 0 everywhere say nothing, and the table is wide enough.
    terms = list(dict.fromkeys(term.name for each in eligible for term in each.terms if term.value))
    table = Table(header_style="bold", box=box.SIMPLE)
    table.add_column("worker", no_wrap=True)
    for column in ("cached", "in flight", "fresh", "requests", "queued", "blocks", *terms, "cost", "chance"):
        table.add_column(column, justify="right")
    for each in eligible:
        picked = (each.worker_id, each.dp_rank) == (decision.worker_id, decision.dp_rank)
        table.add_row(*_cells(each, decision, terms), style="bold green" if picked else None)
    for each in decision.candidates:
        if each.dropped:
            table.add_row(_name(each.worker_name, each.dp_rank), each.dropped, style="dim")
    return table


def _cells(each: common_pb2.Candidate, decision: admin_pb2.Explanation, terms: list[str]) -> list[str]:
    values = {term.name: term.value for term in each.terms}
    blocks = f"{each.active_blocks}/{each.total_blocks}" if each.total_blocks else str(each.active_blocks)
    return [
        _name(each.worker_name, each.dp_rank),
        f"{_overlap(each.overlap)}/{decision.prompt_blocks}",
        str(each.in_flight_blocks),
        f"{each.freshness:.2f}",
        f"{each.active_requests} ({each.waiting_requests} waiting)"
        if each.waiting_requests
        else str(each.active_requests),
        str(each.queued_prefill_tokens),
        blocks,
        *(f"{values[name]:g}" for name in terms),
        f"{each.cost:g}",
        f"{each.chance:.0%}" if each.chance else "",
    ]


def _overlap(overlap: common_pb2.Overlap) -> str:
    """Blocks by tier, the nearest first; tiers that hold nothing are left out at the end."""
    tiers = [overlap.device_blocks, overlap.host_blocks, overlap.disk_blocks, overlap.remote_blocks]
    while len(tiers) > 1 and not tiers[-1]:
        tiers.pop()
    return "+".join(map(str, tiers))


def _name(name: str, rank: int) -> str:
    return f"{name} rank {rank}" if rank else name


def outcome(result: Outcome, faults: Faults) -> RenderableType:
    """What came of a replay."""
    return Group(*_summary(result, faults), _shares(result), *_differences(result))


def _summary(result: Outcome, faults: Faults) -> Iterator[Text]:
    total = result.decisions
    yield Text.assemble(
        (f"{result.changed} of {total} decisions", "bold"), f" ({result.changed / total:.1%}) would be other ones"
    )
    yield Text(
        f"tokens not cached where they went: {result.before_new_tokens} of {result.prompt_tokens}; "
        f"they would be {result.after_new_tokens} ({result.after_new_tokens - result.before_new_tokens:+d})"
    )
    for count, what in (
        (result.unlike, "decisions are not what the settings of that time lead to: another version took them"),
        (result.lost, "decisions were taken faster than they were written, and are missing"),
        (result.skipped, "decisions come before the settings of their endpoint, and were passed over"),
        (faults.count, "lines cannot be read, and were passed over"),
    ):
        if count:
            yield Text(f"{count} {what}", "yellow")
    for told in faults.told:
        yield Text(f"  {told}", "dim")


def _shares(result: Outcome) -> RenderableType:
    table = Table("endpoint", "worker", header_style="bold", box=box.SIMPLE)
    for column in ("picked", "", "would be", ""):
        table.add_column(column, justify="right")
    for endpoint, worker in sorted(result.before | result.after):
        before, after = result.before[endpoint, worker], result.after[endpoint, worker]
        shares = f"{before / result.decisions:.1%}", f"{after / result.decisions:.1%}"
        table.add_row(endpoint, worker, str(before), shares[0], str(after), shares[1])
    return table


def _differences(result: Outcome) -> Iterator[RenderableType]:
    if not result.differences:
        return
    table = Table(header_style="bold", box=box.SIMPLE, title="Differing decisions", title_justify="left")
    for column in ("at", "request", "went to", "would go to", "not cached there", "would be"):
        table.add_column(column)
    for each in result.differences:
        at = datetime.fromtimestamp(each.at).astimezone()
        new = str(each.before_new_tokens), str(each.after_new_tokens)
        table.add_row(f"{at:%Y-%m-%d %H:%M:%S.%f}", each.request_id, each.before, each.after, *new)
    yield table
