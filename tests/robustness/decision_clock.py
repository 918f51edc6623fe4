"""How long decisions take, seen from a process of its own that does nothing else.

python decision_clock.py ADDRESS        asks until its stdin closes, then prints one line of JSON
"""

import json
import random
import select
import sys
import time
from typing import Any

import grpc

from kvrouter_grpc._gen import router_pb2, router_pb2_grpc

PAUSE_S = 0.004
PROMPTS = 64
LENGTH = 512


def percentiles_ms(values: list[float]) -> dict[str, float]:
    """Median, tail and worst of some seconds, in milliseconds."""
    values = sorted(values) or [0.0]
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {name: round(1000 * values[min(int(len(values) * share), len(values) - 1)], 3) for name, share in at.items()}


def say(what: dict[str, Any]) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Ask, sleep, ask again."""
    rng = random.Random(1)
    requests = [
        router_pb2.BestWorkerIdRequest(token_ids=rng.choices(range(300, 20_000), k=LENGTH)) for _ in range(PROMPTS)
    ]
    took: list[float] = []
    with grpc.insecure_channel(sys.argv[1]) as channel:
        stub = router_pb2_grpc.KvRouterStub(channel)
        stub.BestWorkerId(requests[0], wait_for_ready=True)
        say({})
        while True:
            if select.select([sys.stdin], [], [], PAUSE_S)[0]:
                break
            began = time.perf_counter()
            stub.BestWorkerId(requests[len(took) % PROMPTS])
            took.append(time.perf_counter() - began)
    say({"decisions": len(took), "ms": percentiles_ms(took)})


if __name__ == "__main__":
    main()
