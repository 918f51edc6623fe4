"""When snapshots are read and written."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing

import structlog

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.snapshot import Snapshot, SnapshotError
from kvrouter_grpc.snapshots import peer, source
from kvrouter_grpc.snapshots.disk import SnapshotDirectory

LOOK_S = 1.0
"""Between two looks whether there was enough news."""

REST_S = 10.0
"""Least time between two snapshots, however many events there are and whether or not the last one succeeded."""

UNCLAIMED_S = 600.0
"""How long what a snapshot says of a worker waits for that worker to come back."""

log = structlog.get_logger(__name__)


class SnapshotKeeper:
    """Gives the routers of all endpoints what was known before, and keeps what they know on disk.

    Args:
        routers: Endpoint to router.
        config: Where snapshots come from and go to.
    """

    def __init__(self, routers: Mapping[str, Router], config: RouterConfig) -> None:
        self._routers = routers
        self._config = config
        self._directory = SnapshotDirectory(config.snapshot_dir) if config.snapshot_dir is not None else None
        self._writing = asyncio.Lock()

    async def load(self) -> None:
        """Read what there is: from the other router if one is named and answers, else from disk."""
        if self._config.reset_states:
            return
        async with asyncio.TaskGroup() as group:
            for router in self._routers.values():
                group.create_task(self._load(router), name=f"snapshot {router.endpoint}")

    async def run(self) -> None:
        """Write a snapshot whenever there was enough news since the last one, until cancelled."""
        loaded_at = time.monotonic()
        written, seen = loaded_at, source.events(self._routers)
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if now - loaded_at > UNCLAIMED_S:
                for router in self._routers.values():
                    router.snapshot = None
            news = source.events(self._routers)
            if self._directory is None or now - written < REST_S:
                continue
            if abs(news - seen) >= self._config.snapshot_threshold:  # fewer when workers have gone
                await self.write()
                written, seen = time.monotonic(), news

    async def write(self) -> None:
        """Write a snapshot of every endpoint now, if there is a directory for them. One that fails is logged."""
        if self._directory is None:
            return
        async with self._writing:
            for router in self._routers.values():
                started = time.monotonic()
                try:
                    async with aclosing(source.pieces(router)) as pieces:
                        size = await self._directory.write(router.endpoint, pieces)
                except OSError as error:
                    log.warning("snapshot not written", endpoint=router.endpoint, detail=str(error))
                else:
                    seconds = round(time.monotonic() - started, 3)
                    log.info("snapshot written", endpoint=router.endpoint, bytes=size, seconds=seconds)

    async def _load(self, router: Router) -> None:
        if self._config.snapshot_from is not None:
            try:
                data = await peer.fetch(self._config.snapshot_from, router.endpoint)
            except OSError as error:
                log.info("no snapshot", endpoint=router.endpoint, source=self._config.snapshot_from, detail=str(error))
            else:
                if await self._read(router, data, self._config.snapshot_from):
                    return
        if self._directory is not None:
            path = str(self._directory.file(router.endpoint))
            try:
                found = await self._directory.read(router.endpoint)
            except OSError as error:
                log.warning("snapshot not read", endpoint=router.endpoint, source=path, detail=str(error))
                return
            if found is not None:
                await self._read(router, found, path)

    async def _read(self, router: Router, data: bytes, whence: str) -> bool:
        try:
            router.snapshot = await asyncio.to_thread(Snapshot.read, data, router.endpoint)
        except SnapshotError as error:
            detail = f"starting cold: {error}"
            log.warning("snapshot refused", endpoint=router.endpoint, source=whence, detail=detail)
            return False
        age = round(max(0.0, time.time() - router.snapshot.created_at), 1)
        targets = len(router.snapshot.parts)
        log.info("snapshot read", endpoint=router.endpoint, source=whence, targets=targets, age_s=age)
        return targets > 0  # one that knows nothing, such as that of a router that has just begun, is no use
