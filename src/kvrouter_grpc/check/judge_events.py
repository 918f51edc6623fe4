"""Judges what was seen of one rank's events; see `judge`."""

from collections.abc import Callable, Iterator

from kvrouter_grpc import advice
from kvrouter_grpc.check.finding import Finding, Severity, found
from kvrouter_grpc.check.observation import RankSeen, WorkerSeen
from kvrouter_grpc.events.probe import Line

CLOCK_S = 1.0
"""Difference of the clocks from which on it is worth a word. Nothing is decided by the engine's clock."""

REPEATS = 3
"""Whole stores of held blocks from which on they are no chance. A few happen: equal prompts computed at once."""

OK, NOTE, WARNING, FAILURE = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.FAILURE


def judge_rank(seen: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    """Everything that one rank shows: without events, its answers alone."""
    judgements = _JUDGEMENTS if rank.events is not None else (_probe,)
    for judgement in judgements:
        yield from judgement(seen, rank)


def _events(_: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    address = rank.events or ""
    match rank.live_line:
        case Line.OPEN:
            yield Finding("events", OK, "connected", rank=rank.rank)
        case Line.UNUSABLE:
            yield found("events", FAILURE, advice.no_address(address), rank.rank)
        case Line.FOREIGN | Line.MUTE:
            yield found("events", FAILURE, advice.not_zeromq(address), rank.rank)
        case Line.REFUSED | Line.UNREACHED:
            yield Finding(
                "events",
                FAILURE,
                f"{address}: {rank.live_line.value}",
                "correct events= in its entry and the endpoint in --kv-events-config, and open the port",
                rank.rank,
            )


def _topic(seen: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    wanted, heard = seen.spec.topic, rank.tally.topics
    if not heard:
        yield Finding("topic", NOTE, "not seen: no event came", rank=rank.rank)
    elif any(topic.startswith(wanted) for topic in heard):
        yield Finding("topic", OK, ", ".join(sorted(heard)) or "none", rank=rank.rank)
    else:
        yield found("topic", FAILURE, advice.wrong_topic(wanted, heard), rank.rank)


def _replay(_: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    tally = rank.tally
    if rank.replay is None:
        yield Finding(
            "replay",
            WARNING,
            "there is no replay port: what it cached before the router started, and whatever gets lost, stays unknown",
            "give replay_endpoint in --kv-events-config, and replay= in its entry if the engine does not tell it",
            rank.rank,
        )
        return
    if rank.replay_line is not Line.OPEN:
        line = rank.replay_line or Line.UNREACHED
        yield Finding(
            "replay",
            WARNING,
            f"{rank.replay}: {line.value}",
            "correct replay= in its entry and replay_endpoint in --kv-events-config, and open the port",
            rank.rank,
        )
    elif not rank.replay_ended:
        yield Finding(
            "replay",
            WARNING,
            f"{rank.replay} accepts requests but the answer does not come to its end ({tally.replayed} batches came)",
            "see whether the engine is overloaded; raise --events-replay-timeout-s",
            rank.rank,
        )
    elif tally.missing:
        yield Finding(
            "replay",
            NOTE,
            f"{tally.missing} of {tally.replayed + tally.missing} batches were missing from the answer, as vLLM up to "
            "0.32 loses some of long ones; the router asks for them again",
            rank=rank.rank,
        )
    elif tally.first_seq:
        yield Finding(
            "replay",
            NOTE,
            f"the oldest {tally.first_seq} batches are gone from its ring: a router that starts now does not see what "
            "was cached by them",
            "raise buffer_steps in --kv-events-config to keep more",
            rank.rank,
        )
    else:
        yield Finding("replay", OK, f"answers, whole, {tally.replayed} batches", rank=rank.rank)


def _reading(seen: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    tally = rank.tally
    if tally.unreadable or rank.misshapen:
        yield Finding(
            "events",
            FAILURE,
            f"{tally.unreadable + rank.misshapen} messages are no KV event batches",
            "let events= and replay= lead to vLLM's own ports, and use a vLLM that this router knows",
            rank.rank,
        )
    if tally.unknown:
        yield Finding(
            "events",
            NOTE,
            f"events of unknown kinds are passed over: {', '.join(sorted(tally.unknown))}",
            rank=rank.rank,
        )
    if tally.ranks - {rank.rank} and (seen.spec.dp_size or 1) > 1:
        yield Finding(
            "ranks",
            FAILURE,
            f"the port of rank {rank.rank} publishes the events of rank {', '.join(map(str, sorted(tally.ranks)))}",
            "give the ports of rank 0 as events= and replay=; rank r is looked for at port + r",
            rank.rank,
        )


def _names(seen: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    if seen.facts is None or not rank.tally.adapters:
        return
    served = {*seen.facts.loras, *(seen.spec.models or ())}
    strange = sorted(rank.tally.adapters - served)
    if strange:
        yield Finding(
            "adapters",
            WARNING,
            f"its events name LoRA adapters that it does not serve: {', '.join(strange)}",
            "call an adapter in requests as the events do, or nothing matches; ignore this if it was unloaded",
            rank.rank,
        )
    else:
        yield Finding("adapters", OK, ", ".join(sorted(rank.tally.adapters)), rank=rank.rank)


def _report_mode(seen: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    tally, capacity = rank.tally, seen.spec.total_kv_blocks
    over = capacity is not None and tally.most_held > capacity
    if over or tally.repeated >= REPEATS:
        told = (
            f"{tally.most_held} blocks in a cache of {capacity}" if over else f"{tally.repeated} stores of held blocks"
        )
        yield found("report mode", WARNING, advice.reports_reused(told), rank.rank)


def _clock(_: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    ahead = rank.tally.ahead_s
    if ahead is None:
        yield Finding("clock", NOTE, "not seen: no event was published meanwhile", rank=rank.rank)
    elif abs(ahead) > CLOCK_S:
        yield Finding(
            "clock",
            WARNING,
            f"its events are stamped {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} our clock",
            "keep the clocks of both hosts in step (NTP), or logs and metrics cannot be compared",
            rank.rank,
        )
    else:
        yield Finding("clock", OK, f"within {CLOCK_S:g} s of ours", rank=rank.rank)


def _probe(seen: WorkerSeen, rank: RankSeen) -> Iterator[Finding]:
    probe = rank.probe
    if seen.facts is None:
        return
    if probe is None:
        yield Finding("cached tokens", NOTE, "not asked: allow a probe prompt with --probe", rank=rank.rank)
        return
    if probe.error or probe.second is None:
        yield Finding(
            "probe",
            FAILURE,
            f"a prompt of {probe.tokens} tokens got no answer: {probe.error or 'none in time'}",
            "see the engine's log",
            rank.rank,
        )
        return
    size = (probe.tokens - 1) // probe.blocks
    cached, expected = probe.second.cached_tokens, probe.blocks * size
    if rank.live_line is Line.OPEN:
        if probe.stored:
            yield Finding("probe", OK, "the event of a new prompt arrives", rank=rank.rank)
        else:
            yield Finding(
                "probe",
                FAILURE,
                f"no event told of the {probe.blocks} blocks of a new prompt",
                "switch events and prefix caching on, and let events= be this engine's own port",
                rank.rank,
            )
    if cached is None:
        yield found("cached tokens", WARNING, advice.cached_tokens_untold(), rank.rank)
    elif cached != expected:
        yield Finding(
            "cached tokens",
            WARNING if cached else FAILURE,
            f"a prompt sent twice had {cached} of {expected} tokens cached the second time",
            "switch prefix caching on; with several ranks or replicas behind one url, give each its own",
            rank.rank,
        )
    else:
        yield Finding("cached tokens", OK, f"reported, {cached} of {expected} as expected", rank=rank.rank)


_JUDGEMENTS: tuple[Callable[[WorkerSeen, RankSeen], Iterator[Finding]], ...] = (
    _events,
    _topic,
    _replay,
    _reading,
    _names,
    _report_mode,
    _clock,
    _probe,
)
