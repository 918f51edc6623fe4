"""Book a request on the best worker and talk to the worker directly: python examples/reserve.py [address].

Needs aiohttp beside kvrouter-client.
"""

import asyncio
import json
import sys

import aiohttp

from kvrouter_client import KvRouterClient

PROMPT = list(range(1, 101))


async def main(address: str = "127.0.0.1:50051") -> None:
    async with (
        KvRouterClient(address) as router,
        aiohttp.ClientSession(raise_for_status=True) as http,
        router.reserve(PROMPT) as reservation,
    ):
        worker = reservation.choice
        answer = await http.post(
            f"{worker.url}/v1/completions",
            json={"prompt": PROMPT, "max_tokens": 16, "stream": True},
            headers={
                "X-Request-Id": reservation.request_id,
                "X-data-parallel-rank": str(worker.dp_rank),
            },
        )
        waiting = True
        async for line in answer.content:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            if waiting:
                await reservation.mark_prefill_complete()
                waiting = False
            print(json.loads(data)["choices"][0]["text"], end="", flush=True)


asyncio.run(main(*sys.argv[1:]))
