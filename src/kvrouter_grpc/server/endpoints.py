"""The endpoints that this process serves."""

from collections.abc import Collection, Mapping

from kvrouter_grpc.errors import InvalidRequestError, UnknownEndpointError
from kvrouter_grpc.routing.router import Router

PARTS = 3


class Endpoints:
    """Endpoint to router, as requests name them."""

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self._routers = routers
        self._only = next(iter(routers.values())) if len(routers) == 1 else None

    def one(self, endpoint: str) -> Router:
        """The router of an endpoint; of the only one when the request names none.

        Raises:
            InvalidRequestError: It is not of the form, or it is left out although there are several.
            UnknownEndpointError: It is not served here.
        """
        if not endpoint:
            if self._only is None:
                raise InvalidRequestError([("endpoint", f"is empty; name one of {self._served()}")])
            return self._only
        router = self._routers.get(endpoint)
        if router is None:
            parts = endpoint.split(".")
            if len(parts) != PARTS or not all(parts):
                raise InvalidRequestError([("endpoint", "is not of the form namespace.component.endpoint")])
            raise UnknownEndpointError(
                f"endpoint: {endpoint!r} is not served here; served are {self._served()}",
                metadata={"endpoint": endpoint},
            )
        return router

    def some(self, endpoint: str) -> Collection[Router]:
        """The router of an endpoint, or all of them when the request names none. Raises as `one`."""
        return [self.one(endpoint)] if endpoint else self._routers.values()

    def _served(self) -> str:
        return ", ".join(sorted(self._routers))
