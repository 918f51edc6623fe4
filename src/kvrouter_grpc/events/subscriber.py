"""Follows one rank's KV event stream: messages from the sockets in, batches in order out to the index."""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
import zmq

from kvrouter_grpc import advice
from kvrouter_grpc.advice import Advice
from kvrouter_grpc.config import EventsConfig
from kvrouter_grpc.core import BatchError
from kvrouter_grpc.events.batch_log import HIGHEST_SEQ
from kvrouter_grpc.events.rota import Place, Rota
from kvrouter_grpc.events.schedule import ReplaySchedule
from kvrouter_grpc.events.sequence import StreamTracker, Verdict
from kvrouter_grpc.events.sink import KvSink
from kvrouter_grpc.events.sockets import Change, EventSockets, EventSource, Message, read_changes
from kvrouter_grpc.types import StreamState, Target

__all__ = ["EventSource", "Subscriber"]

CHUNK = 64
"""Replayed messages taken at once, so that live ones advance with them."""

REOPEN_S = 1.0
"""Least time without a connection after which the socket is replaced: ZeroMQ itself never reconnects after a peer broke
the protocol or sent a message over the limit."""

UNREACHED_S = 2.0
"""Time without any connection after which it is told: the engine itself has answered before."""

END = b"\xff" * 8
"""Sequence number -1: the end of a replay."""

log = structlog.get_logger(__name__)


class Subscriber:
    """Follows the stream of one (worker, rank). `run()` lasts until it is cancelled.

    Args:
        target: Whose stream it is.
        source: Where to connect.
        index: Gets the batches.
        config: Limits and timeouts.
        context: ZMQ context, shared by all subscribers.
        on_disconnect: Called when the live connection is lost: the worker may be dead.
        on_fault: Called with what keeps events from coming, and with None once they come.
        rng: Jitter of the back-off.
        rota: Shared by the subscribers of an event loop, which take turns.
    """

    def __init__(
        self,
        target: Target,
        source: EventSource,
        index: KvSink,
        config: EventsConfig,
        context: zmq.Context[Any],
        *,
        rota: Rota,
        on_disconnect: Callable[[], None] | None = None,
        on_fault: Callable[[Advice | None], None] | None = None,
        rng: random.Random,
    ) -> None:
        self._target = target
        self._source = source
        self._index = index
        self._config = config
        self._on_disconnect = on_disconnect
        self._on_fault = on_fault
        self._context = context
        self._rota = rota
        self._place: Place | None = None  # in the rota
        self._sockets: EventSockets
        self._feed = index.feed(target)
        self._status = index.stream(target)
        self._tracker = StreamTracker(
            can_replay=source.replay is not None,
            max_held=config.max_pending_batches,
            max_held_bytes=config.max_message_bytes,
            max_attempts=config.stale_after_replays,
            readable=_is_whole,
        )
        self._heard: deque[tuple[int, bytes]] = deque()  # live batches that are still to be told to the tracker
        self._answers: deque[Message] = deque()  # the same of replayed messages
        self._losses = 0  # of the tracker, as far as the index was told
        self._restart_reported = False
        self._resync_asked = False
        self._stirred = True  # more than batches in order may have changed the status
        self._fault: Advice | None = None  # why nothing can be heard
        self._unreadable = ""  # what was wrong with the last unreadable message
        self._unfinished = False  # an answer may still be on its way
        self._schedule = ReplaySchedule(config, rng, audits=source.replay is not None)
        self._reopen_s = max(REOPEN_S, 2 * config.reconnect_max_ms / 1000)
        self._reopen_at = math.inf
        self._unreached_at = math.inf

    def notify_restarted(self) -> None:
        """The worker's process is known to be a new one, e.g. by its start time."""
        self._restart_reported = True
        self._call()

    def resync(self) -> None:
        """The picture foretells wrongly: doubt it, and take it again if the publisher still has all of it."""
        self._resync_asked = True
        self._call()

    def _call(self) -> None:
        if self._place is not None:
            self._place.call()

    async def run(self) -> None:
        """Follow the stream until cancelled."""
        if self._status.resume_at is not None and self._source.replay is not None:
            self._tracker.intake.resume(self._status.resume_at)
            self._status.resume_at = None  # the next subscriber begins cold
        self._status.position = lambda: self._tracker.position
        now = asyncio.get_running_loop().time()
        self._place = place = self._rota.join(self)
        self._sockets = EventSockets(self._source, self._config, self._context, place)
        try:
            if self._open(now):
                self._schedule.postpone_audit(now)
                self._unreached_at = now + UNREACHED_S
            else:
                self._set_fault(advice.no_address(self._source.events))
                self._reopen_at = math.inf
                self._report()
            await asyncio.Event().wait()  # the rota lets it work
        finally:
            self._sockets.close()
            place.leave()

    # --- a turn of work -------------------------------------------------------------------------------------------

    def work(self, now: float, ends_at: float) -> bool:
        """Work off what has arrived and do what is due; see `rota.Stream`."""
        busy = self._work_off(now, ends_at)
        if not busy:
            if self._restart_reported:
                self._restart_reported = False
                self._heed(self._tracker.restarted())
            if self._resync_asked:
                self._resync_asked = False
                self._status.resyncs += 1
                self._tracker.resync()
                self._doubt(now)
            if now >= self._unreached_at:
                self._unreached_at = math.inf
                if self._tracker.unreached and self._fault is None:
                    self._set_fault(advice.events_unreached(self._source.events))
            if now >= self._reopen_at:
                self._open(now)
            busy = self._pace(now)
        if self._stirred:
            self._stirred = False
            self._report()
        return busy

    def _work_off(self, now: float, ends_at: float) -> bool:
        """Apply what is in order and take in messages until there are none or time is up; whether it is.

        The sockets tell of new arrivals only once they were read empty, so nothing may be left when this says no.
        """
        drained = False
        tracker = self._tracker
        while True:
            if tracker.intake.coverage.losses != self._losses:
                self._doubt(now)
            if tracker.intake.ready and (taken := tracker.intake.take()) is not None:
                self._apply(taken[1])
            elif self._heard:
                self._heed(self._live(*self._heard.popleft()))
            elif self._answers:
                self._heed(self._replayed(self._answers.popleft(), now))
            elif drained:
                return False
            else:
                drained = self._fetch(now)
            if time.perf_counter() >= ends_at:
                break
        # Even in a storm, what is overdue must be given up and asked for again.
        if not tracker.intake.ready:
            self._pace(now)
        return True

    def _doubt(self, now: float) -> None:
        """Before anything is applied that comes after what was lost."""
        self._schedule.hasten_audit(now)
        self._losses = self._tracker.intake.coverage.losses
        self._stirred = True
        if self._tracker.intake.faulty:
            self._index.doubt(self._target)

    def _fetch(self, now: float) -> bool:
        """Take messages from the sockets, and apply those that are in order; whether the sockets are empty now."""
        tracker, status = self._tracker, self._status
        found = self._sockets.deliver(tracker.intake.log, self._feed, in_order=tracker.in_order)
        self._answers.extend(self._sockets.replayed(CHUNK))
        if found is not None:
            tracker.followed(found.batches)
            status.last_seq = tracker.intake.next_seq - 1
            status.known = tracker.intake.coverage.taken
            status.skipped += found.skipped
            status.unread += found.skipped
            status.batches += found.batches
            if status.state is not StreamState.LIVE:
                self._stirred = True
            if found.batches or found.left:
                self._note_arrival(now)
                self._set_fault(None)
            if found.cleared:
                self._cleared()
            if found.fault:
                status.batches -= 1
                self._unread(found.fault)
            if found.misshapen:
                self._misshapen("not the three frames [topic, sequence number, payload]", found.misshapen)
            for change in read_changes(found.changes):
                self._changed(change, now)
            self._heard.extend(found.left)
        return self._sockets.drained

    def _changed(self, change: Change, now: float) -> None:
        self._stirred = True
        if change is Change.UP:
            self._reopen_at = math.inf
            if self._fault == advice.events_unreached(self._source.events):
                self._set_fault(None)
            self._tracker.connected()
            self._schedule.postpone_audit(now)
        elif change is Change.DOWN:
            self._reopen_at = now + self._reopen_s
            self._tracker.disconnected()
            if self._on_disconnect is not None:
                self._on_disconnect()
        else:
            self._set_fault(advice.not_zeromq(self._source.events))

    def _note_arrival(self, now: float) -> None:
        self._status.last_event_at = time.monotonic()
        if not self._tracker.repairable:
            self._schedule.postpone_audit(now)

    def _set_fault(self, fault: Advice | None) -> None:
        """What keeps events from coming; None once some have come."""
        if fault != self._fault:
            self._fault = fault
            self._stirred = True
            if self._on_fault is not None:
                self._on_fault(fault)

    def _live(self, seq: int, payload: bytes) -> Verdict:
        if self._tracker.in_order and self._tracker.intake.log.follow(seq, payload):
            self._tracker.followed(1)
            self._apply(payload)
            return Verdict.APPLY
        return self._tracker.live(seq, payload)

    def _replayed(self, message: Message, now: float) -> Verdict:
        if not self._tracker.replaying:
            return Verdict.DUPLICATE  # of an answer that was given up
        # [b"", topic, sequence number, payload]; vLLM up to 0.25 sends no topic.
        if len(message) not in (3, 4) or len(message[-2]) != 8:
            return self._misshapen("not the frames of a replay")
        self._schedule.answered(now)
        if message[-2] != END:
            seq = int.from_bytes(message[-2])
            if seq > HIGHEST_SEQ:
                return self._misshapen("a sequence number that is none")
            if len(message) == 4 and not message[1].startswith(self._source.topic.encode()):
                # Replays come whatever the topic is; live events, which are filtered by it, never will.
                self._set_fault(advice.wrong_topic(self._source.topic, [message[1].decode("utf-8", "replace")]))
            verdict = self._tracker.replayed(seq, message[-1])
            if verdict is not Verdict.DUPLICATE:
                self._status.last_event_at = time.monotonic()  # what was lost on the way was said all the same
            return verdict
        self._schedule.ended()
        self._unfinished = False
        return self._tracker.replay_ended()

    def _misshapen(self, fault: str, count: int = 1) -> Verdict:
        self._stirred = True
        self._status.decode_failures += count
        self._unreadable = fault
        return Verdict.DUPLICATE

    def _unread(self, fault: str) -> None:
        self._misshapen(fault)
        self._tracker.unreadable()

    def _heed(self, verdict: Verdict) -> None:
        self._stirred = True
        if verdict is Verdict.RESTART:
            log.info("stream starts over", worker_id=self._target.worker_id, dp_rank=self._target.dp_rank)
            self._status.unread = 0
            self._index.clear(self._target)

    def _apply(self, payload: bytes) -> None:
        self._stirred = True
        try:
            applied = self._feed.apply(payload)
        except BatchError as error:
            self._unread(str(error))
            return
        self._status.batches += 1
        self._status.skipped += applied.skipped
        self._status.unread += applied.skipped
        if applied.cleared:
            self._cleared()

    def _cleared(self) -> None:
        self._stirred = True
        self._tracker.intake.emptied()
        self._index.cleared(self._target)

    # --- what is due ----------------------------------------------------------------------------------------------

    def _pace(self, now: float) -> bool:
        """Give up an answer that is overdue, ask when it is time to; whether a request was sent."""
        tracker = self._tracker
        if tracker.replaying and now >= self._schedule.reply_due:
            self._stirred = True
            tracker.replay_failed()
            self._schedule.failed(now)
        if self._unfinished and not tracker.replaying:
            # Late messages of an answer that was given up would pass for the next one's.
            self._sockets.close_replay()
            self._answers.clear()
            self._unfinished = False
        if self._schedule.audit_due(now, repairs=tracker.repairable):
            self._stirred = True
            tracker.audit()
        if tracker.intake.ready:
            return True
        if not tracker.wants_replay or now < self._schedule.ask_after:
            return False
        self._schedule.asked(now)
        self._unfinished = self._stirred = True
        self._status.replays += 1
        # What cannot be sent ends like what is not answered: by the timeout.
        return self._sockets.ask(tracker.replay_asked())

    def due(self) -> float:
        """When there is something to do without any message; see `rota.Stream`."""
        tracker = self._tracker
        scheduled = self._schedule.due(replaying=tracker.replaying, wants_replay=tracker.wants_replay)
        return min(self._reopen_at, self._unreached_at, scheduled)

    def _open(self, now: float) -> bool:
        """Connect to the publisher, and see to it that the attempt does not last for ever."""
        self._reopen_at = now + self._reopen_s
        return self._sockets.open_live()

    # --- what is told of it ---------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Bring the status up to date."""
        tracker, status, coverage = self._tracker, self._status, self._tracker.intake.coverage
        if tracker.intake.faulty and self._losses == coverage.losses and self._index.renewed(self._target):
            tracker.intake.renewed()
        before, doubted, lost = status.state, status.doubted, status.lost
        status.state = tracker.state
        if status.state is not StreamState.SYNCING:
            status.unsettled_at = None
        elif status.unsettled_at is None:
            status.unsettled_at = time.monotonic()
        status.known = coverage.taken
        status.lost = coverage.lost
        status.behind = tracker.intake.behind
        status.doubted = tracker.doubted
        status.last_seq = tracker.intake.next_seq - 1
        status.gaps = tracker.gaps
        status.missed = coverage.missed
        status.restarts = tracker.restarts
        status.partial = coverage.partial
        status.settled = self._fault is not None or tracker.settled
        status.detail = str(self._fault) if self._fault is not None else tracker.detail
        if status.state is StreamState.STALE and self._unreadable:
            status.detail += f"; the last unreadable message: {self._unreadable}"
        if (status.state, status.doubted, status.lost) != (before, doubted, lost):
            self._index.refresh(self._target)  # what only time changes is refreshed by the fleet
        if status.state is not before and StreamState.STALE in (status.state, before):
            level = log.warning if status.state is StreamState.STALE else log.info
            level(
                "stream " + status.state.value,
                worker_id=self._target.worker_id,
                dp_rank=self._target.dp_rank,
                detail=status.detail,
            )


def _is_whole(payload: bytes) -> bool:
    try:
        msgspec.msgpack.decode(payload)
    except (ValueError, RecursionError):
        return False
    return True
