"""Dynamo's programs as processes: its indexer, and its router over its mock workers. No etcd, NATS or GPU."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import peers, work
from bench.harness import Bench
from bench.side import Side, environment

START_S = 60.0


@dataclass
class Service:
    """One of its programs that follow vLLM's events by themselves and answer over HTTP."""

    pid: int
    address: str


def installed(bench: Bench) -> bool:
    """Whether Dynamo is to be measured and can be."""
    return peers.dynamo_python(bench) is not None


@contextmanager
def indexer(addresses: Sequence[str]) -> Iterator[Service]:
    """`dynamo.indexer` with these workers registered; one thread, which costs it the least CPU."""
    with _service("dynamo.indexer", 1) as service:
        for number, address in enumerate(addresses):
            worker = {"instance_id": number, "endpoint": address, "model_name": work.MODEL, "block_size": work.BLOCK}
            _post(service, "register", worker)
        yield service


@contextmanager
def select_service(addresses: Sequence[str]) -> Iterator[Service]:
    """`dynamo.select_service` with these workers registered."""
    with _service("dynamo.select_service", 4) as service:
        for number, address in enumerate(addresses):
            worker = {
                "worker_id": number,
                "endpoint": f"http://127.0.0.1:{9000 + number}",
                "kv_events_endpoint": address,
                "block_size": work.BLOCK,
                "total_kv_blocks": 100_000,
                "max_num_batched_tokens": 8192,
            }
            _post(service, "workers", worker)
        yield service


@contextmanager
def _service(module: str, threads: int) -> Iterator[Service]:
    port = _free_port()
    with _process(module, "--port", str(port), "--threads", str(threads)) as pid:
        _wait(port)
        yield Service(pid, f"127.0.0.1:{port}")


def _post(service: Service, path: str, content: dict[str, object]) -> None:
    request = urllib.request.Request(
        f"http://{service.address}/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10):  # noqa: S310
        pass


@dataclass
class RouterPids:
    """`dynamo.router` and its mock workers."""

    router: int
    workers: int


@contextmanager
def router(workers: int) -> Iterator[tuple[Side, RouterPids]]:
    """Dynamo's router over its mock workers at full speed, and a client of it."""
    home = peers.CACHE / "dynamo-run"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    plane = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(home / "kv"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_LOG": "error",
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
    }
    with ExitStack() as stack:
        mocker = ["--model-name", work.MODEL, "--num-workers", str(workers), "--block-size", str(work.BLOCK)]
        mocker += ["--kv-bytes-per-token", "1024", "--endpoint", "dyn://dynamo.backend.generate"]
        mocker += ["--speedup-ratio", "1000000", "--num-gpu-blocks-override", "100000"]
        worker_pid = stack.enter_context(_process("dynamo.mocker", *mocker, env=plane))
        time.sleep(6)  # neither program says when it is there
        flags = ["--endpoint", "dynamo.backend.generate", "--router-block-size", str(work.BLOCK)]
        router_pid = stack.enter_context(_process("dynamo.router", *flags, env=plane))
        time.sleep(4)
        python = peers.CACHE / "dynamo/bin/python"
        client = stack.enter_context(Side("bench.sides.dynamo_client", python=python, env=plane))
        client.call("connect")
        yield client, RouterPids(router_pid, worker_pid)


@contextmanager
def _process(module: str, *arguments: str, env: dict[str, str] | None = None) -> Iterator[int]:
    python: Path = peers.CACHE / "dynamo/bin/python"
    with (peers.CACHE / f"{module}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(python), "-m", module, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment() | {"DYN_LOG": "error"} | (env or {}),
            cwd=peers.CACHE,
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(port: int) -> None:
    ends = time.monotonic() + START_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)
