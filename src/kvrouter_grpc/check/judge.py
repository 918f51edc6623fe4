"""Judges what was seen of the workers: pure, one function per subject, each giving what it finds.

Every judgement says something, so that a report without warnings shows what was looked at.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from kvrouter_grpc import advice
from kvrouter_grpc.check.finding import Finding, Severity, found
from kvrouter_grpc.check.judge_events import judge_rank
from kvrouter_grpc.check.observation import WorkerSeen
from kvrouter_grpc.upstream.vllm_http import Health

OLDEST = (0, 10, 2)
"""The first vLLM whose completions API takes `return_token_ids`."""

NEWEST = (0, 33)
"""The last minor version whose events and replays are known here."""

OK, NOTE, WARNING, FAILURE = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.FAILURE

_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


def judge(seen: WorkerSeen) -> list[Finding]:
    """Everything that one worker shows, in the order in which one would look at it."""
    findings = list(_http(seen))
    if seen.facts is not None:
        for judgement in _JUDGEMENTS:
            findings += judgement(seen)
    findings += _events(seen)
    if seen.timed_out:
        findings.append(
            Finding("time", FAILURE, "not everything was seen in time", "raise --timeout, or see why it is slow")
        )
    return findings


def judge_fleet(fleet: Sequence[WorkerSeen]) -> list[Finding]:
    """What only shows in the workers of one endpoint together."""
    findings = []
    for endpoint in dict.fromkeys(seen.given.endpoint for seen in fleet):
        members = [seen for seen in fleet if seen.given.endpoint == endpoint]
        sizes = {size: seen.given.name for seen in members if (size := seen.spec.block_size)}
        if len(sizes) > 1:
            told = ", ".join(f"{size} ({name})" for size, name in sorted(sizes.items()))
            findings.append(
                Finding(
                    "block size",
                    FAILURE,
                    f"the workers of {endpoint} cache blocks of different sizes: {told}",
                    "start all workers of an endpoint with one --block-size",
                )
            )
    return findings


def _http(seen: WorkerSeen) -> Iterator[Finding]:
    if seen.health is not Health.GOOD:
        said = seen.health.value if seen.health is not None else "not asked"
        yield Finding(
            "http", FAILURE, f"{seen.given.url}/health: {said}", "start the engine, or correct url= in its entry"
        )
    if seen.facts is None:
        if seen.health is Health.GOOD:
            yield Finding(
                "http", FAILURE, seen.error or "no answer", "let url= lead to vLLM's OpenAI-compatible server"
            )
        return
    if seen.health is Health.GOOD:
        names = ", ".join((*seen.facts.models, *seen.facts.loras))
        yield Finding("http", OK, f"healthy, serves {names}")


def _version(seen: WorkerSeen) -> Iterator[Finding]:
    told = seen.facts.version if seen.facts else None
    match = _VERSION.match(told or "")
    if told is None or match is None:
        yield Finding("version", NOTE, "the engine does not say which version it is" if told is None else f"{told}")
        return
    version = int(match[1]), int(match[2]), int(match[3] or 0)
    oldest = ".".join(map(str, OLDEST))
    if version < OLDEST:
        yield Finding(
            "version", FAILURE, f"vLLM {told} does not return token ids over HTTP", f"use vLLM {oldest} or later"
        )
    elif version[:2] > NEWEST:
        yield Finding("version", NOTE, f"vLLM {told} is newer than this router knows; unknown fields are passed over")
    else:
        yield Finding("version", OK, f"vLLM {told}")


def _models(seen: WorkerSeen) -> Iterator[Finding]:
    served = {*seen.facts.models, *seen.facts.loras} if seen.facts else set()
    missing = [name for name in seen.given.models or () if name not in served]
    if missing:
        yield Finding(
            "models",
            FAILURE,
            f"its entry names {', '.join(missing)}, which it does not serve",
            f"correct model= in its entry; it serves {', '.join(sorted(served))}",
        )


def _ranks(seen: WorkerSeen) -> Iterator[Finding]:
    told = max(seen.facts.dp_size if seen.facts else 1, (seen.settings and seen.settings.dp_size) or 1)
    given = seen.given.dp_size
    if given is not None and given != told and seen.facts is not None:
        yield Finding(
            "ranks",
            FAILURE if given > told else WARNING,
            f"its entry says that it has {_ranks_told(given)}, the engine says {_ranks_told(told)}",
            "correct or remove dp= in its entry",
        )
    else:
        yield Finding("ranks", OK, _ranks_told(told))


def _ranks_told(count: int) -> str:
    return f"{count} data-parallel rank{'' if count == 1 else 's'}"


def _block_size(seen: WorkerSeen) -> Iterator[Finding]:
    name, given, router = seen.given.name, seen.given.block_size, seen.router_block_size
    reported = seen.facts.block_size if seen.facts else None
    told: dict[int, str] = {}  # size to the first who told it
    for size, source in (
        (reported, "as it reports"),
        (seen.settings.block_size if seen.settings else None, "in /server_info"),
        *((size, "its KV events") for rank in seen.ranks for size in sorted(rank.tally.block_sizes)),
        (given, "in its entry"),
    ):
        if size:
            told.setdefault(size, source)
    if not told:
        yield Finding(
            "block size",
            WARNING,
            "neither the engine nor the configuration tells it before the first event",
            "give block-size= in its entry or --router-block-size",
        )
        return
    expected = router or reported or next(iter(told))
    misconfigured = given is not None and reported is not None and given != reported
    if given and reported and misconfigured:
        yield found("block size", FAILURE, advice.block_size_misconfigured(name, given, reported))
    wrong = [size for size in told if size != expected and not (misconfigured and size == given)]
    for size in wrong:
        yield found("block size", FAILURE, advice.block_sizes_differ(name, size, told[size], expected))
    if not wrong and not misconfigured:
        yield Finding("block size", OK, f"{expected} tokens")


def _caching(seen: WorkerSeen) -> Iterator[Finding]:
    told = seen.facts.prefix_caching if seen.facts else None
    if told is False:
        yield found("prefix caching", FAILURE, advice.no_prefix_caching())
    elif told:
        yield Finding("prefix caching", OK, "on")


def _tokenizer(seen: WorkerSeen) -> Iterator[Finding]:
    if seen.differing:
        yield Finding(
            "tokenizer",
            FAILURE,
            f"it tokenizes {seen.differing[0]!r} differently from the router: text prompts would match nothing",
            "let --tokenizer be the one that the engine was started with",
        )
    elif seen.differing is not None:
        yield Finding("tokenizer", OK, "sample texts give the same token ids")


def _events(seen: WorkerSeen) -> Iterator[Finding]:
    if not seen.spec.kv_events:
        yield Finding("events", NOTE, "none are expected: what it caches is predicted")
    elif seen.spec.events is None:
        off = (seen.facts is not None and seen.facts.kv_events is False) or (
            seen.settings is not None and seen.settings.kv_events is False
        )
        if off:
            yield found("events", WARNING, advice.events_off())
        elif seen.facts is not None:
            yield found("events", WARNING, advice.events_nowhere())
    for rank in seen.ranks:
        yield from judge_rank(seen, rank)


_JUDGEMENTS: tuple[Callable[[WorkerSeen], Iterator[Finding]], ...] = (
    _version,
    _models,
    _ranks,
    _block_size,
    _caching,
    _tokenizer,
)
