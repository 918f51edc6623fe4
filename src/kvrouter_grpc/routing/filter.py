"""Who takes part in a decision: of those that may take the request, those that are not too busy, and its session's."""

from array import array
from collections.abc import Callable, Mapping
from typing import cast

from kvrouter_grpc.core import Shortlist, TargetTable
from kvrouter_grpc.routing import eligibility
from kvrouter_grpc.routing.gate import Gate
from kvrouter_grpc.routing.roster import Lane, LeftOut, Occasion, Roster
from kvrouter_grpc.routing.sessions import Sessions, session_of
from kvrouter_grpc.types import RoutingRequest, Target

OVERLOADED = "overloaded: above a threshold of the endpoint"


class Filter:
    """Narrows the workers of an endpoint down to those among which the decision chooses.

    Args:
        endpoint: Named in errors.
        table: The rows of the targets.
        roster: Who may take a request.
        gate: Who is too busy.
        sessions: Where sessions are bound; None where they are not.
        clock: Monotonic seconds.
        only_pinned: Whether every request has to name its worker.
    """

    def __init__(
        self,
        endpoint: str,
        table: TargetTable,
        roster: Roster,
        gate: Gate,
        sessions: Sessions | None,
        clock: Callable[[], float],
        *,
        only_pinned: bool,
    ) -> None:
        self._endpoint = endpoint
        self._table = table
        self._roster = roster
        self._gate = gate
        self._sessions = sessions
        self._clock = clock
        self._only_pinned = only_pinned

    def lane(self, model: str) -> Lane:
        """What a prompt for `model` is decided by that asks for nothing else.

        Raises:
            RouterError: As `shortlist` and `Roster.model_for`.
        """
        lane = self._roster.lane(model)
        if self._gate.limits:
            lane = lane._replace(shortlist=self._below_thresholds(lane.request, lane.shortlist))
        if self._only_pinned:
            raise eligibility.not_pinned()
        return lane

    def shortlist(self, request: RoutingRequest, *, explained: bool) -> Shortlist:
        """The targets among which the decision for a request chooses, at least one.

        Args:
            request: The request.
            explained: Whether it must be known why the others were left out.

        Raises:
            RouterError: There are none; the class and message say why.
        """
        hints = request.hints
        shortlist = self._able(request, explained=explained)
        if self._only_pinned and hints.worker_id is None:
            raise eligibility.not_pinned()
        if self._sessions is not None and (session := session_of(hints)) is not None:
            shortlist = self._at_home(self._sessions, session, shortlist)
        if explained and (hints.override is not None or request.prefilled):
            occasion = cast("Occasion", shortlist.occasion)
            occasion = occasion._replace(override=hints.override, prefilled=request.prefilled)
            shortlist = Shortlist(shortlist.rows, occasion)
        if hints.preferred_taints:
            shortlist = self._preferring(hints.preferred_taints, shortlist)
        return shortlist

    def all_busy(self, request: RoutingRequest) -> bool:
        """Whether every worker that may take a request is busy.

        Raises:
            RouterError: There are none, as `shortlist`.
        """
        return self._gate.all_busy(self._able(request, explained=False).rows)

    def bind(self, request: RoutingRequest, target: Target) -> None:
        """A request was sent to `target`: its session stays there."""
        if self._sessions is not None and (session := session_of(request.hints)) is not None:
            self._sessions.bind(session, target, self._clock())

    def _able(self, request: RoutingRequest, *, explained: bool) -> Shortlist:
        shortlist = self._roster.shortlist(request, explained=explained)
        return self._below_thresholds(request, shortlist) if self._gate.limits else shortlist

    def _below_thresholds(self, request: RoutingRequest, shortlist: Shortlist) -> Shortlist:
        below = self._gate.below(shortlist.rows)
        if not below:
            worker = self._roster.seat(shortlist.rows[0]).worker
            raise eligibility.overloaded(self._endpoint, worker, request.hints)
        return self._narrowed(shortlist, below, OVERLOADED)

    def _at_home(self, sessions: Sessions, session: int, shortlist: Shortlist) -> Shortlist:
        """The target alone that the session is bound to; all of them when it is free, or that one is not there."""
        target = sessions.find(session, self._clock())
        row = self._table.row(target) if target is not None else None
        if row is None or row not in shortlist.rows:
            return shortlist
        reason = f"its session is bound to {self._roster.seat(row).worker.spec.name}"
        return self._narrowed(shortlist, array("I", [row]), reason)

    def _narrowed(self, shortlist: Shortlist, kept: "array[int]", reason: str) -> Shortlist:
        """The shortlist when only some are kept, in their order, and the others left out for a reason."""
        if len(kept) == len(shortlist.rows):
            return shortlist
        occasion = cast("Occasion | None", shortlist.occasion)
        if occasion is not None:
            others = [self._roster.seat(row) for row in sorted(set(shortlist.rows).difference(kept))]
            left_out = tuple(LeftOut(seat.target, seat.worker.spec.name, reason) for seat in others)
            occasion = occasion._replace(left_out=occasion.left_out + left_out)
        return Shortlist(kept, occasion)

    def _preferring(self, taints: Mapping[str, float], shortlist: Shortlist) -> Shortlist:
        """The shortlist with what each of its workers' taints is worth to the request."""
        specs = (self._roster.seat(row).worker.spec for row in shortlist.rows)
        preferences = array("d", [sum(taints.get(taint, 0.0) for taint in spec.taints) for spec in specs])
        return Shortlist(shortlist.rows, shortlist.occasion, preferences)
