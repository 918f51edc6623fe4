"""Predictions of caches as a list of requests: what `kvrouter_grpc.routing.forecast` must agree with once settled."""

from dataclasses import dataclass, field
from math import inf


@dataclass
class Request:
    target: str
    blocks: list[int]
    began: int
    ended: int = 0
    expires_at: float = inf


@dataclass
class Forecast:
    """The rules without any bookkeeping."""

    ttl_s: float
    max_blocks: int
    keep: float
    capacity: dict[str, int]
    requests: list[Request] = field(default_factory=list)
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def begin(self, target: str, blocks: list[int]) -> Request:
        request = Request(target, blocks, self.tick())
        self.requests.append(request)
        return request

    def end(self, request: Request, now: float, computed: bool) -> None:
        if request in self.requests and not request.ended:
            if computed:
                request.ended, request.expires_at = self.tick(), now + self.ttl_s
            else:
                self.requests.remove(request)

    def lengthen(self, request: Request, blocks: list[int]) -> None:
        if not request.ended:
            request.blocks = blocks

    def correct(self, request: Request, cached: int) -> None:
        if request not in self.requests or cached >= len(request.blocks):
            return
        evicted = request.blocks[cached]
        proofs = [
            other.ended
            for other in self.requests
            if other.target == request.target and 0 < other.ended < request.began and evicted in other.blocks
        ]
        if proofs:
            self._drop(lambda other: other.target == request.target and 0 < other.ended <= max(proofs))

    def forget(self, target: str) -> None:
        self._drop(lambda other: other.target == target)

    def settle(self, now: float) -> None:
        for target, capacity in self.capacity.items():
            while capacity and len(self.held(target)) > capacity and self._drop_oldest(target):
                pass
        if self.size > self.max_blocks:
            while self.size > int(self.max_blocks * self.keep) and self._drop_oldest():
                pass
        self._drop(lambda other: other.expires_at <= now)

    def held(self, target: str) -> set[int]:
        return {block for request in self.requests if request.target == target for block in request.blocks}

    @property
    def size(self) -> int:
        return sum(len(self.held(target)) for target in {request.target for request in self.requests})

    def _drop(self, which) -> None:
        self.requests = [request for request in self.requests if not which(request)]

    def _drop_oldest(self, target: str | None = None) -> bool:
        over = [other for other in self.requests if other.ended and target in (None, other.target)]
        if over:
            self.requests.remove(min(over, key=lambda other: other.ended))
        return bool(over)
