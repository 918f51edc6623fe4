"""Stream an answer: python examples/generate.py [address]."""

import asyncio
import sys

from kvrouter_client import KvRouterClient


async def main(address: str = "127.0.0.1:50051") -> None:
    async with KvRouterClient(address) as router:
        async for chunk in router.generate(range(1, 101), max_tokens=16):
            print(*chunk.token_ids, end=" ", flush=True)


asyncio.run(main(*sys.argv[1:]))
