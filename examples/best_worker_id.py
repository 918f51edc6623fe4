"""Ask where a request would go, and why: python examples/best_worker_id.py [address]."""

import asyncio
import sys

from kvrouter_client import KvRouterClient


async def main(address: str = "127.0.0.1:50051") -> None:
    async with KvRouterClient(address) as router:
        choice = await router.best_worker_id(range(1, 101), include_candidates=True)
    print(f"{choice.worker_name} at {choice.url}, rank {choice.dp_rank}")
    print(f"{choice.expected_cached_tokens} of {choice.prompt_tokens} tokens cached")
    for candidate in choice.candidates:
        terms = ", ".join(f"{name} {value:g}" for name, value in candidate.terms.items())
        cost = candidate.dropped if candidate.cost is None else f"cost {candidate.cost:g} = {terms}"
        print(f"  {candidate.worker_name}/{candidate.dp_rank}: {candidate.overlap.total} blocks, {cost}")


asyncio.run(main(*sys.argv[1:]))
