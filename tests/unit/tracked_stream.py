"""A stream tracker driven input by input, and what was taken from it."""

from collections.abc import Callable

import pytest

from kvrouter_grpc.events.sequence import StreamTracker, Verdict
from kvrouter_grpc.types import StreamState

APPLY, DUPLICATE, HOLD, GAP, RESTART = Verdict
COLD, SYNCING, LIVE, STALE = StreamState.COLD, StreamState.SYNCING, StreamState.LIVE, StreamState.STALE


class Stream:
    """A tracker and what was taken from it; `RESTART` is written down as a "|" between what was before and after."""

    follows = True  # whether batches that come in order take the short way

    def __init__(
        self,
        *,
        replay: bool = True,
        max_held: int = 100,
        max_held_bytes: int = 10_000,
        attempts: int = 3,
        readable: Callable[[bytes], bool] = lambda _: True,
    ) -> None:
        self.tracker = StreamTracker(
            can_replay=replay,
            max_held=max_held,
            max_held_bytes=max_held_bytes,
            max_attempts=attempts,
            readable=readable,
        )
        self.taken: list[int | str] = []

    def drain(self, verdict: Verdict) -> Verdict:
        if verdict is RESTART:
            self.taken.append("|")
        while (batch := self.tracker.intake.take()) is not None:
            self.read(*batch)
        return verdict

    def read(self, seq: int, payload: bytes) -> None:
        if payload.startswith(b"bad"):
            self.tracker.unreadable()
        else:
            self.taken.append(seq)

    def live(self, *seqs: int, process: str = "a") -> list[Verdict]:
        return [self.one_live(seq, f"{process}{seq}".encode()) for seq in seqs]

    def one_live(self, seq: int, payload: bytes) -> Verdict:
        if self.follows and self.tracker.in_order and self.tracker.intake.log.follow(seq, payload):
            self.tracker.followed(1)
            self.read(seq, payload)
            return self.drain(APPLY)
        return self.drain(self.tracker.live(seq, payload))

    def replay(self, *seqs: int, process: str = "a", ends: bool = True) -> list[Verdict]:
        """An answer to the replay that is wanted now."""
        assert self.tracker.wants_replay
        self.asked = self.tracker.replay_asked()
        verdicts = [self.drain(self.tracker.replayed(seq, f"{process}{seq}".encode())) for seq in seqs]
        if ends and self.tracker.replaying:
            verdicts.append(self.drain(self.tracker.replay_ended()))
        return verdicts

    def silence(self) -> None:
        assert self.tracker.wants_replay
        self.asked = self.tracker.replay_asked()
        self.tracker.replay_failed()
        self.drain(APPLY)

    @property
    def state(self) -> StreamState:
        return self.tracker.state


@pytest.fixture(autouse=True, params=[True, False], ids=["follows", "told"])
def way(request, monkeypatch) -> None:
    """A batch in order may be followed or told: nothing else may differ."""
    monkeypatch.setattr(Stream, "follows", request.param)


def connected(**kwargs) -> Stream:
    stream = Stream(**kwargs)
    stream.tracker.connected()
    return stream


def synced(*seqs: int, **kwargs) -> Stream:
    """Connected, its history fetched, `seqs` received live."""
    stream = connected(**kwargs)
    if stream.tracker.wants_replay:
        stream.replay()
    stream.live(*seqs)
    return stream
