"""Real vLLM engines for the tests: start, kill, restart, ask them directly, and leave nothing behind."""

import asyncio
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import aiohttp
import zmq
import zmq.asyncio

from e2e.waiting import until

E2E = Path(__file__).parent
CACHE = E2E.parent.parent / ".cache" / "vllm"
MODEL = CACHE / "model"
MODEL_NAME = "tiny"
LORA_NAME = "tiny-lora"
VOCABULARY = 512
FIRST_WORD = 5  # the tokens below are special
MAX_MODEL_LEN = 1024
# Some five million weights: a prompt takes much longer to compute than to carry around.
SLOW_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
START_TIMEOUT_S = 100.0
REPLAY_TIMEOUT_S = 10.0
REPLAY_ATTEMPTS = 3

_port_random = random.Random(os.getpid())
_ports_given: set[int] = set()


def free_ports(count: int) -> int:
    """The first of `count` consecutive free TCP ports.

    vLLM needs its ports before it starts (ranks count upwards from a base). They are taken from below the ephemeral range, so
    that no outgoing connection of this machine can sit on one of them, and never twice in a run.
    """
    for _ in range(1000):
        first = _port_random.randrange(15000, 32000)
        wanted = range(first, first + count)
        if not _ports_given.isdisjoint(wanted):
            continue
        try:
            for port in wanted:
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        _ports_given.update(wanted)
        return first
    raise RuntimeError(f"no {count} consecutive free ports")


async def _is_free(port: int) -> bool:
    """Whether a server could listen there: a child of the one before may outlive it for a moment, with its socket."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is set up. One block of `blocks` is vLLM's null block, never used."""

    block_size: int
    blocks: int
    lora: bool = True
    dp_size: int = 1
    tells_event_sockets: bool = True  # GET /kv_event_sources
    kv_transfer: bool = False  # a NIXL connector, for prefill and decode pools
    tokens_per_step: int = 2048
    ring: int = 10_000  # event batches that can be replayed
    most_running: int = 8
    max_model_len: int = MAX_MODEL_LEN
    shape: Mapping[str, int] = field(
        default_factory=dict
    )  # of another model than the tiny one; its weights are made up

    def having(self, **changes: Any) -> Self:
        """The same but for these."""
        return replace(self, **changes)

    def arguments(self, port: int, events: int, replay: int) -> list[str]:
        """The command line of `vllm serve`."""
        kv_events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{events}",
            "replay_endpoint": f"tcp://*:{replay}",
            "topic": "kv-events",
            "buffer_steps": self.ring,
        }
        flags: dict[str, str | int] = {
            "--model": str(MODEL),
            "--served-model-name": MODEL_NAME,
            "--host": "127.0.0.1",
            "--port": port,
            "--dtype": "float32",
            "--max-model-len": self.max_model_len,
            "--block-size": self.block_size,
            "--num-gpu-blocks-override": self.blocks,
            "--kv-cache-memory-bytes": 64 << 20,
            "--max-num-seqs": self.most_running,
            "--max-num-batched-tokens": self.tokens_per_step,
            "--data-parallel-size": self.dp_size,
            "--distributed-executor-backend": "uni",
            "--kv-events-config": json.dumps(kv_events),
        }
        words = [str(word) for flag in flags.items() for word in flag]
        words += ["--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
        if self.kv_transfer:
            connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
            words += ["--kv-transfer-config", json.dumps(connector)]
        if self.shape:
            words += ["--hf-overrides", json.dumps(self.shape), "--load-format", "dummy"]
        if self.lora:
            words += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{LORA_NAME}={MODEL}-lora"]
        return words


@dataclass(frozen=True)
class Answer:
    """What an engine answered when it was asked directly."""

    token_ids: list[int]
    text: str
    cached_tokens: int


class Zygote:
    """A process that has one vLLM imported and forks engines (see `zygote.py`)."""

    def __init__(self, version: str, log: Path) -> None:
        self.version = version
        self.log = log
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(CACHE / version), str(CACHE / "nixl")]),
            "XDG_CACHE_HOME": str(CACHE / "home"),
            "XDG_CONFIG_HOME": str(CACHE / "home"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less: the executor runs inside the engine core
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [CACHE / "common" / "bin" / "python", E2E / "zygote.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                text=True,
                bufsize=1,
                start_new_session=True,  # Ctrl-C is for the tests, which then close the zygote
            )
        self._ready = False

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._ready:
            self._ready = bool(self._answer())
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote of vLLM {self.version} died:\n{self.log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it and every engine it forked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Engine:
    """One vLLM server with fixed ports; `start` after `kill` is the same pod restarted."""

    def __init__(self, zygote: Zygote, name: str, options: EngineOptions, log: Path) -> None:
        self.name = name
        self.options = options
        self.log = log
        self._zygote = zygote
        self._port = free_ports(1)
        self._events = free_ports(options.dp_size)
        self._replay = free_ports(options.dp_size)
        self._side_channel = free_ports(options.dp_size)
        self.url = f"http://127.0.0.1:{self._port}"
        self.events = f"tcp://127.0.0.1:{self._events}"
        self.replay = f"tcp://127.0.0.1:{self._replay}"

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.options.block_size

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can use, per rank."""
        return self.options.blocks - 1

    def start(self) -> None:
        """Fork it; it serves once `wait_ready` returns."""
        arguments = self.options.arguments(self._port, self._events, self._replay)
        environment = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self._side_channel),
        }
        self._zygote.ask(
            "start",
            name=self.name,
            log=str(self.log),
            arguments=arguments,
            environment=environment if self.options.kv_transfer else {},
        )

    def wait_ready(self) -> None:
        """Wait until `/health` answers 200."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if (status := self._zygote.ask("poll", name=self.name)["exit"]) is not None:
                raise RuntimeError(f"engine {self.name} ended ({status}):\n{self.log.read_text()[-4000:]}")
            try:
                with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=1)) as connection:
                    connection.request("GET", "/health")
                    if connection.getresponse().status == http.HTTPStatus.OK:
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"engine {self.name} is not up after {START_TIMEOUT_S} s:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """SIGKILL all of its processes, as the kernel's OOM killer or a lost node would; returns when they are gone."""
        self._zygote.ask("stop", name=self.name, number=signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM and, when the grace is over, SIGKILL, as Kubernetes sends them; returns when it is gone."""
        self._zygote.ask("stop", name=self.name, number=signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP all of its processes: its connections stay open, and nobody answers."""
        self._zygote.ask("signal", name=self.name, number=signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT after `freeze`."""
        self._zygote.ask("signal", name=self.name, number=signal.SIGCONT)

    async def restart(self) -> None:
        """Start again after `kill` or `terminate` and wait until it serves."""
        await until(lambda: _is_free(self._port), f"port {self._port} of {self.name} is free again")
        self.start()
        await asyncio.to_thread(self.wait_ready)

    # --- the engine's own word ------------------------------------------------------------------------------------

    async def ask(self, tokens: Sequence[int], dp_rank: int | None = None, **body: Any) -> dict[str, Any]:
        """`POST /v1/completions`, past the router; greedy unless `body` says otherwise."""
        request = {
            "model": MODEL_NAME,
            "prompt": list(tokens),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **body,
        }
        headers = {"X-data-parallel-rank": str(dp_rank)} if dp_rank is not None else {}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.url}/v1/completions", json=request, headers=headers) as response,
        ):
            answer: dict[str, Any] = await response.json()
            assert response.status == http.HTTPStatus.OK, answer
        return answer

    async def generate(self, tokens: Sequence[int], max_tokens: int = 1, **options: Any) -> Answer:
        """`ask` for one answer."""
        answer = await self.ask(tokens, max_tokens=max_tokens, **options)
        (choice,) = answer["choices"]
        details = answer["usage"].get("prompt_tokens_details") or {}
        return Answer(choice["token_ids"], choice["text"], details.get("cached_tokens") or 0)

    async def drop_cache(self) -> None:
        """Drop every cached block, once no request holds any; the next step of each rank will say so."""
        async with aiohttp.ClientSession() as session:

            async def reset() -> bool:
                async with session.post(f"{self.url}/reset_prefix_cache") as response:
                    return bool((await response.json())["success"])

            await until(reset, f"{self.name} drops its cache")

    async def clear(self) -> None:
        """Drop every cached block, and have that said in the event stream.

        A prompt of one token makes the step that says it, and leaves nothing behind.
        """
        await self.drop_cache()
        for dp_rank in range(self.options.dp_size):
            await self.generate([VOCABULARY - 1], dp_rank=dp_rank)

    async def last_seq(self, dp_rank: int = 0) -> int | None:
        """Sequence number of the last event batch of all that the engine has done so far; None before the first.

        Asked of the replay socket. The thread that answers it also publishes, at least one queued batch between two
        answers, so two equal answers in a row mean that nothing is queued any more.
        """
        host, _, port = self.replay.rpartition(":")
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVHWM, 0)  # or the end of a long answer may be lost
            dealer.connect(f"{host}:{int(port) + dp_rank}")
            last = await _last_replayed(dealer, after=-1)
            while (again := await _last_replayed(dealer, after=last)) != last:
                last = again
        return last if last >= 0 else None

    async def metric(self, name: str, **labels: str) -> float:
        """A gauge or counter of `/metrics`, summed over its label sets that have these labels."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        found = re.findall(rf"^{re.escape(name)}(?:\{{([^}}]*)\}})? (\S+)$", text, re.MULTILINE)
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        values = [float(value) for said, value in found if wanted <= set(said.split(","))]
        assert values, f"{name} is not in /metrics of {self.name}"
        return sum(values)


async def _last_replayed(dealer: zmq.asyncio.Socket, after: int) -> int:
    """The last sequence number that a replay from `after + 1` brings, or `after`."""
    for attempt in range(REPLAY_ATTEMPTS):
        await dealer.send_multipart([b"", (after + 1).to_bytes(8)])
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                while (frames := await dealer.recv_multipart())[-1]:  # an empty payload ends the answer
                    after = max(after, int.from_bytes(frames[-2]))
        except TimeoutError:  # the engine drops what does not fit its queue, the end of an answer too
            if attempt + 1 == REPLAY_ATTEMPTS:
                raise
        else:
            break
    return after
