"""The router and its mock workers as processes, as an operator would start them."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import grpc

from bench import work
from bench.side import ROOT, environment
from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc

ENDPOINT = "bench.backend.generate"
READY_S = 60.0
SETTINGS = {
    "KVROUTER_LOG_LEVEL": "error",
    # The simulated workers answer nothing while they publish, and must not be taken for dead.
    "KVROUTER_UPSTREAM_HEALTH_INTERVAL_S": "300",
    "KVROUTER_UPSTREAM_HEALTH_TIMEOUT_S": "300",
    "KVROUTER_SERVER_DRAIN_PROPAGATION_S": "0",
    "KVROUTER_SERVER_DRAIN_TIMEOUT_S": "1",
}


@dataclass
class Router:
    """A serving router."""

    pid: int
    address: str

    def workers(self) -> admin_pb2.ListWorkersResponse:
        """What it says of its workers."""
        with grpc.insecure_channel(self.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
            return admin_pb2_grpc.KvRouterAdminStub(channel).ListWorkers(admin_pb2.ListWorkersRequest(), timeout=30)

    def blocks(self) -> int:
        """Blocks that its index holds, over all workers."""
        return sum(stream.blocks for worker in self.workers().workers for stream in worker.streams)


@contextmanager
def router(workers: Sequence[str], *flags: str) -> Iterator[Router]:
    """`kvrouter serve` with these `--worker`s, ready.

    Raises:
        TimeoutError: It does not become ready.
    """
    arguments = ["serve", "--listen", "127.0.0.1:0", "--endpoint", ENDPOINT, "--router-seed", "1", *flags]
    for worker in workers:
        arguments += ["--worker", worker]
    with program(arguments) as (pid, said):
        running = Router(pid, said["address"])
        ends = time.monotonic() + READY_S
        while True:
            listed = running.workers()
            if listed.ready and len(listed.workers) == len(workers) and all(w.state == 2 for w in listed.workers):
                break
            if time.monotonic() > ends:
                raise TimeoutError(f"the router is not ready: {list(listed.findings)[:3]}")
            time.sleep(0.05)
        yield running


@contextmanager
def mock_workers(count: int) -> Iterator[list[str]]:
    """Mock workers at full speed; the `--worker` of each."""
    with ExitStack() as stack:
        flags = []
        for number in range(count):
            arguments = ["mock-worker", "--full-speed", "--model", work.MODEL, "--block-size", str(work.BLOCK)]
            arguments += ["--num-blocks", "100000", "--max-model-len", "65536", "--vocab-size", str(work.VOCAB)]
            _, said = stack.enter_context(program(arguments))
            flags.append(f"name=w{number},url={said['url']},events={said['events'][0]},replay={said['replay'][0]}")
        yield flags


@contextmanager
def program(arguments: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run `kvrouter <arguments>`: its pid and the line of JSON that it prints when it is there."""
    log = ROOT / f".cache/bench/{arguments[0]}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrouter_grpc", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment() | SETTINGS,
        )
    with process:
        try:
            line = cast("IO[str]", process.stdout).readline()
            if not line:
                raise RuntimeError(f"kvrouter {arguments[0]} did not start:\n{log.read_text()[-2000:]}")
            yield process.pid, json.loads(line)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
