"""The project's programs as processes: each says in one line of JSON where it is, and ends in order on SIGTERM."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
ENDPOINT = "dynamo.backend.generate"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


def environment() -> dict[str, str]:
    """That of the tests without settings of the router's own, the sources importable, and drains that do not linger."""
    own = ("KVROUTER_", "DYN_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    sources = [
        str(ROOT / "src"),
        str(ROOT / "clients/python/src"),
        str(ROOT / "clients/prefill_handler/src"),
        env.get("PYTHONPATH", ""),
    ]
    return env | {
        "PYTHONPATH": os.pathsep.join(filter(None, sources)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "KVROUTER_SERVER_DRAIN_PROPAGATION_S": "0",
        "KVROUTER_SERVER_DRAIN_TIMEOUT_S": "5",
    }


@dataclass
class Program:
    """A running program.

    Attributes:
        said: The line of JSON that it printed when it was ready.
    """

    said: dict[str, Any]
    process: subprocess.Popen[str]

    def kill(self) -> None:
        """End it without a chance to say good-bye."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)


@contextmanager
def program(arguments: Sequence[str]) -> Iterator[Program]:
    """Run `kvrouter <arguments>` until the block ends.

    Raises:
        AssertionError: It does not start, or does not end with 0; the message has what it wrote to standard error.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrouter_grpc", *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(),
        )
        with process:
            try:
                running = Program(_first_line(process, log), process)
                yield running
            finally:
                alive = process.poll() is None
                process.terminate()
                try:
                    code = process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
            assert not alive or code == 0, f"ended with {code}:\n{_text(log)}"


def _first_line(process: subprocess.Popen[str], log: IO[str]) -> dict[str, Any]:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    line = process.stdout.readline() if readable else ""
    assert line, f"{process.args} did not start:\n{_text(log)}"
    said: dict[str, Any] = json.loads(line)
    return said


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


def wait_until_ready(address: str) -> None:
    """Return once the router at `address` takes requests; fails after the time in which it must."""
    request = health_pb2.HealthCheckRequest(service="kvrouter.v1.KvRouter")
    with grpc.insecure_channel(address) as channel:
        for reply in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=START_TIMEOUT_S):
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return
    raise AssertionError(f"the router at {address} ended before it was ready")


FULL_SPEED = ("--full-speed",)


@contextmanager
def mock_worker(*arguments: str) -> Iterator[Program]:
    """A mock worker on free ports."""
    with program(["mock-worker", "--port", "0", *arguments]) as worker:
        yield worker


@dataclass
class Fleet:
    """A router and its workers.

    Attributes:
        address: Of the router.
        workers: By their names in the router.
    """

    address: str
    router: Program
    workers: dict[str, Program]


@contextmanager
def fleet(size: int = 2, *arguments: str, workers: Sequence[str] = FULL_SPEED) -> Iterator[Fleet]:
    """`size` mock workers called w0, w1, ... behind a router.

    Args:
        size: Number of workers.
        *arguments: Further arguments of the router.
        workers: Arguments of each worker.
    """
    with ExitStack() as stack:
        running = {f"w{i}": stack.enter_context(mock_worker(*workers)) for i in range(size)}
        flags = ["serve", "--endpoint", ENDPOINT, "--listen", "127.0.0.1:0", "--router-seed", "1"]
        flags += ["--router-min-initial-workers", str(size)]
        for name, worker in running.items():
            flags += ["--worker", worker_flag(name, worker)]
        router = stack.enter_context(program([*flags, *arguments]))
        wait_until_ready(router.said["address"])
        yield Fleet(router.said["address"], router, running)


def worker_flag(name: str, worker: Program) -> str:
    """What `--worker` says of a mock worker."""
    said = worker.said
    return f"name={name},url={said['url']},events={said['events'][0]},replay={said['replay'][0]}"
