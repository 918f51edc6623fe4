"""What was seen of a worker. Filled while it is looked at, so that running out of time keeps what is known."""

from dataclasses import dataclass, field

from kvrouter_grpc.check.tally import EventTally
from kvrouter_grpc.events.probe import Line
from kvrouter_grpc.types import Usage, WorkerFacts, WorkerSpec
from kvrouter_grpc.upstream.facts import EngineSettings
from kvrouter_grpc.upstream.vllm_http import Health


@dataclass(slots=True)
class ProbeSeen:
    """One prompt, sent twice to one rank.

    Attributes:
        tokens: Of the prompt.
        blocks: Full blocks in it.
        first: Counts of the first answer; None while there is none.
        second: Counts of the second.
        stored: Whether an event told of its blocks.
        error: Why there is no answer, "" when there is.
    """

    tokens: int
    blocks: int
    first: Usage | None = None
    second: Usage | None = None
    stored: bool = False
    error: str = ""


@dataclass(slots=True)
class RankSeen:
    """One data-parallel rank's events.

    Attributes:
        rank: Which one.
        events: Address of its publisher.
        replay: Address of its replay port, None when it has none.
        live_line: The connection to the publisher.
        replay_line: The connection to the replay port, None when none was made.
        replay_ended: Whether the replay came to its end marker.
        misshapen: Messages that have not the frames of a batch.
        tally: What was heard.
        probe: The probe prompt, None when none was sent.
    """

    rank: int
    events: str | None = None
    replay: str | None = None
    live_line: Line = Line.UNREACHED
    replay_line: Line | None = None
    replay_ended: bool = False
    misshapen: int = 0
    tally: EventTally = field(default_factory=EventTally)
    probe: ProbeSeen | None = None


@dataclass(slots=True)
class WorkerSeen:
    """One worker.

    Attributes:
        given: Its entry in the configuration.
        spec: The same, completed by what the worker says.
        router_block_size: Tokens per block that the router is configured for, None when it learns them.
        health: What `/health` said.
        facts: What it says of itself; None when it does not answer.
        error: Why not.
        settings: Of `/server_info`, where it answers.
        differing: Texts that it tokenizes differently from our tokenizer; None when that was not compared.
        ranks: Its ranks; empty where no events are expected.
        timed_out: Whether time ran out before all was seen.
    """

    given: WorkerSpec
    spec: WorkerSpec
    router_block_size: int | None = None
    health: Health | None = None
    facts: WorkerFacts | None = None
    error: str = ""
    settings: EngineSettings | None = None
    differing: list[str] | None = None
    ranks: list[RankSeen] = field(default_factory=list)
    timed_out: bool = False
