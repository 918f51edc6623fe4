"""Prefill on one worker, decode on another: blocks that wait to be fetched, and the fetching.

Real engines move the KV over NIXL. Between mocks there is nothing to move, so the decode worker only tells the prefill
worker, over its HTTP port, that it has everything, and learns how many tokens that is.
"""

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from kvrouter_grpc.mock_worker.api_error import internal
from kvrouter_grpc.mock_worker.engine import Engine
from kvrouter_grpc.mock_worker.sequence import Sequence

PULL_PATH = "/mock/kv_transfer"
_PULL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Pinned:
    engine: Engine
    sequence: Sequence
    tokens: int
    expiry: asyncio.TimerHandle


class TransferStore:
    """Prefilled requests of one worker whose blocks stay until a decode worker has fetched them."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        """Set up an empty store.

        Args:
            host: Where decode workers reach this worker.
            port: Its HTTP port.
            timeout_s: Seconds after which unfetched blocks are freed.
        """
        self.engine_id = str(uuid.uuid4())
        self._host = host
        self._port = port
        self._timeout_s = timeout_s
        self._pinned: dict[str, _Pinned] = {}

    def offer(self, request_id: str, engine: Engine, sequence: Sequence) -> dict[str, Any]:
        """Keep an ended sequence's blocks; returns the `kv_transfer_params` for the decode worker."""
        key = f"{request_id}-{uuid.uuid4().hex[:8]}"
        expiry = asyncio.get_running_loop().call_later(self._timeout_s, self._expire, key)
        self._pinned[key] = _Pinned(engine, sequence, sequence.prompt_tokens, expiry)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(sequence.table.blocks)],
            "remote_engine_id": self.engine_id,
            "remote_request_id": key,
            "remote_host": self._host,
            "remote_port": self._port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": sequence.prompt_tokens,
            "remote_blocks_expiry_time": time.time() + self._timeout_s,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": sequence.cached_tokens,
        }

    def fetch(self, key: str) -> int | None:
        """Let the blocks of a request go; returns its tokens, None when it is not (or no longer) kept."""
        pinned = self._pinned.pop(key, None)
        if pinned is None:
            return None
        pinned.expiry.cancel()
        pinned.engine.release(pinned.sequence)
        return pinned.tokens

    def close(self) -> None:
        """Forget everything; no timer survives."""
        for pinned in self._pinned.values():
            pinned.expiry.cancel()
        self._pinned.clear()

    def _expire(self, key: str) -> None:
        self.fetch(key)


async def pull(session: aiohttp.ClientSession, host: str, port: int, request_id: str) -> int:
    """Fetch a prefilled request from its worker; returns the tokens that came with it.

    Raises:
        ApiError: 500, like vLLM, when that worker cannot be reached or no longer has the blocks.
    """
    try:
        async with session.post(
            f"http://{host}:{port}{PULL_PATH}",
            json={"request_id": request_id},
            timeout=aiohttp.ClientTimeout(total=_PULL_TIMEOUT_S),
        ) as response:
            if response.status == 200:
                return int(msgspec.json.decode(await response.read(), type=dict[str, int])["num_tokens"])
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, msgspec.DecodeError):
        pass
    raise internal("KV transfer failed: the prefill worker did not hand over the blocks")
