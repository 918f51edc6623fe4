"""Waits until a request is booked: not at all as a rule, in the endpoint's queue while its workers are busy."""

import asyncio

from kvrouter_grpc.routing.loads import Lease
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.types import RoutingRequest


async def booked(router: Router, routing: RoutingRequest, ttl_s: float | None = None) -> Lease:
    """Book a request, as `Router.lease` does, when its turn has come. A caller that is cancelled leaves nothing behind.

    Raises:
        RouterError: As `Admission.admit`.
        QueueFullError: There was no room in the queue.
        QueueTimeoutError: Its turn did not come in time.
    """
    admission = router.admission
    if admission is None:
        return router.lease(routing, ttl_s)
    loop = asyncio.get_running_loop()
    turn: asyncio.Future[Lease] = loop.create_future()

    def settle(outcome: Lease | Exception) -> None:
        if isinstance(outcome, Lease):
            if turn.done():  # cancelled, and its caller has not come round to giving up
                outcome.release()
            else:
                turn.set_result(outcome)
        elif not turn.done():
            turn.set_exception(outcome)

    applicant = admission.admit(routing, settle, ttl_s)
    if isinstance(applicant, Lease):
        return applicant
    timer = loop.call_later(admission.timeout_s, admission.time_out, applicant)
    try:
        return await turn
    except asyncio.CancelledError:
        admission.give_up(applicant)
        if not turn.cancelled() and turn.exception() is None:
            turn.result().release()  # its turn came just now
        raise
    finally:
        timer.cancel()
