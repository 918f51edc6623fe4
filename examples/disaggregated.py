"""Who computes a prompt and who answers it: python examples/disaggregated.py [address] [decode endpoint]."""

import asyncio
import sys

from kvrouter_client import KvRouterClient


async def main(address: str = "127.0.0.1:50051", endpoint: str = "") -> None:
    async with (
        KvRouterClient(address) as router,
        router.generate(range(1, 201), max_tokens=1, endpoint=endpoint) as stream,
    ):
        routing = (await anext(stream)).routing
        if routing is None or routing.prefill is None:
            print("the endpoint has no prefill pool")
        elif routing.prefill.remote:
            print(f"{routing.prefill.worker_name} computed the prompt, {routing.worker_name} answers")
        else:
            print(f"{routing.worker_name} does both: {routing.prefill.reason}")


asyncio.run(main(*sys.argv[1:]))
