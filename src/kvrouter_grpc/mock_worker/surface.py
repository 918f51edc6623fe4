"""The HTTP surface: vLLM's paths, answers and manners."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kvrouter_grpc.mock_worker.answer import STREAM_END, Answer
from kvrouter_grpc.mock_worker.api_error import ApiError, bad_request, internal, malformed, not_found, unavailable
from kvrouter_grpc.mock_worker.blocks import BlockTable
from kvrouter_grpc.mock_worker.completion import Completion, parse_completion, remote_prefill
from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.engine import Engine
from kvrouter_grpc.mock_worker.metrics import render_metrics
from kvrouter_grpc.mock_worker.outbox import Outbox
from kvrouter_grpc.mock_worker.publisher import EventPublisher
from kvrouter_grpc.mock_worker.scheduler import open_requests
from kvrouter_grpc.mock_worker.sequence import Sequence
from kvrouter_grpc.mock_worker.tokens import Walk, encode_text, token_text
from kvrouter_grpc.mock_worker.transfer import PULL_PATH, TransferStore, pull

_MAX_BODY_BYTES = 64 << 20
_SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8"}
# vLLM's internal load balancer: a waiting request weighs as much as four running ones.
_WAITING_WEIGHT = 4

_ENGINE_DEAD = "EngineCore encountered an issue."


class Surface:
    """Handlers over the engines of one worker."""

    def __init__(
        self, config: MockWorkerConfig, engines: Seq[Engine], publishers: Seq[EventPublisher], transfers: TransferStore
    ) -> None:
        """Serve these engines; `publishers` is empty when KV events are off."""
        self.draining = False
        self.started = time.time()
        self.idle = asyncio.Event()  # no completion is open
        self.idle.set()
        self._config = config
        self._engines = engines
        self._publishers = publishers
        self._transfers = transfers
        self._rejected = 0
        self._open = 0
        self._turn = 0

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_api_errors])
        app.cleanup_ctx.append(self._client_session)
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.get("/health", self._health),
                web.get("/ping", self._health),
                web.post("/ping", self._health),
                web.get("/version", self._version),
                web.get("/load", self._load),
                web.get("/metrics", self._metrics),
                web.get("/server_info", self._server_info),
                web.post("/reset_prefix_cache", self._reset_prefix_cache),
                web.post(PULL_PATH, self._hand_over),
            ]
        )
        if self._config.kv_event_sources:
            app.router.add_get("/kv_event_sources", self._kv_event_sources)
        return app

    async def _client_session(self, _: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession() as self._session:
            yield

    # --- completions ---------------------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        completion = parse_completion(await request.read(), self._config)
        engine = self._pick_engine(request)
        self._check_admission(len(completion.prompts) * completion.body.n)
        self._open += 1
        self.idle.clear()
        try:
            if completion.body.stream:
                return await self._stream(request, completion, engine)
            return await self._complete(request, completion, engine)
        finally:
            self._open -= 1
            if not self._open:
                self.idle.set()

    async def _complete(self, request: web.Request, completion: Completion, engine: Engine) -> web.Response:
        outbox = Outbox()
        sequences = await self._begin(completion, engine, outbox, request)
        request_id = _request_id(request, completion)
        answer = Answer(self._config, completion, request_id, int(time.time()), sequences)
        try:
            while any(sequence.finish_reason is None for sequence in sequences):
                await outbox.get()
        finally:
            params = self._settle(request_id, engine, sequences)
        if engine.failed:
            raise internal(_ENGINE_DEAD)
        return web.Response(body=answer.body(params), content_type="application/json")

    async def _stream(self, request: web.Request, completion: Completion, engine: Engine) -> web.StreamResponse:
        response = web.StreamResponse(headers=_SSE_HEADERS)
        await response.prepare(request)
        sequences: list[Sequence] = []
        request_id = _request_id(request, completion)
        outbox = Outbox()
        try:
            sequences.extend(await self._begin(completion, engine, outbox, request))
            answer = Answer(self._config, completion, request_id, int(time.time()), sequences)
            open_choices = len(sequences)
            while open_choices:
                sequence = await outbox.get()
                if engine.failed:
                    raise internal(_ENGINE_DEAD)
                await response.write(answer.chunk(sequence))
                open_choices -= sequence.finish_reason is not None
            if completion.include_usage:
                await response.write(answer.usage_chunk())
        except ApiError as error:
            await response.write(error.event())
        finally:
            self._settle(request_id, engine, sequences)  # a stream does not say where kept blocks are
        await response.write(STREAM_END)
        await response.write_eof()
        return response

    async def _begin(
        self, completion: Completion, engine: Engine, outbox: Outbox, request: web.Request
    ) -> list[Sequence]:
        body, config = completion.body, self._config
        params = body.kv_transfer_params if config.kv_transfer else None
        source = remote_prefill(params)
        remote_tokens = 0 if source is None else await pull(self._session, *source)
        sequences = [
            Sequence(
                table=BlockTable(
                    list(prompt), completion.scope, session_id=body.session_id or request.headers.get("X-Session-ID")
                ),
                prompt_tokens=len(prompt),
                rules=completion.rules(len(prompt), config.context_tokens),
                walk=Walk(
                    config,
                    prompt,
                    adapter=completion.scope.lora_name or "",
                    variant=(completion.variant << 8) + choice,
                ),
                notify=outbox.put,
                index=number * body.n + choice,
                report_hits=completion.report_hits,
                remote_tokens=remote_tokens,
                keep_blocks=number == choice == 0 and (params or {}).get("do_remote_decode") is True,
            )
            for number, prompt in enumerate(completion.prompts)
            for choice in range(body.n)
        ]
        for sequence in sequences:
            engine.submit(sequence)
        return sequences

    def _settle(self, request_id: str, engine: Engine, sequences: Seq[Sequence]) -> dict[str, Any] | None:
        """End what still runs, since nobody listens any more, and offer blocks that are kept for a decode worker."""
        for sequence in sequences:
            engine.abort(sequence)
        kept = [sequence for sequence in sequences if sequence.keep_blocks and sequence.finish_reason == "length"]
        return self._transfers.offer(request_id, engine, kept[0]) if kept else None

    def _pick_engine(self, request: web.Request) -> Engine:
        if self.draining:
            raise unavailable("The server is shutting down.")
        if any(engine.failed for engine in self._engines):
            raise internal(_ENGINE_DEAD)
        ranks = len(self._engines)
        with suppress(ValueError):  # what is not a number is ignored
            wanted = int(request.headers.get("X-data-parallel-rank", ""))
            if not 0 <= wanted < ranks:
                raise bad_request(f"data_parallel_rank {wanted} is out of range [0, {ranks}).")
            return self._engines[wanted]
        turn, self._turn = self._turn, (self._turn + 1) % ranks  # ties go round
        return min(
            [*self._engines[turn:], *self._engines[:turn]],
            key=lambda engine: engine.scheduler.num_waiting * _WAITING_WEIGHT + engine.scheduler.num_running,
        )

    def _check_admission(self, sequences: int) -> None:
        limit = self._config.max_num_queued_reqs
        if limit is None:
            return
        if open_requests(engine.scheduler for engine in self._engines) + sequences > limit:
            self._rejected += 1
            raise unavailable("The engine is currently busy. Please retry later.")

    # --- everything else -----------------------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if any(engine.failed for engine in self._engines) else 200)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self._config.version})

    async def _load(self, _: web.Request) -> web.Response:
        return web.json_response({"server_load": 0})  # as vLLM without --enable-server-load-tracking

    async def _metrics(self, _: web.Request) -> web.Response:
        text = render_metrics(self._config, self._engines, self.started, self._rejected)
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _models(self, _: web.Request) -> web.Response:
        config = self._config
        base = (config.model, config.model, None, config.context_tokens)
        adapters = [(name, path, config.model, None) for name, path in config.adapters]
        data = [
            {
                "id": name,
                "object": "model",
                "created": int(self.started),
                "owned_by": "vllm",
                "root": root,
                "parent": parent,
                "max_model_len": length,
            }
            for name, root, parent, length in (base, *adapters)
        ]
        return web.json_response({"object": "list", "data": data})

    async def _kv_event_sources(self, _: web.Request) -> web.Response:
        config = self._config
        sources = {
            str(rank): {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": publisher.events_endpoint,
                "replay_endpoint": publisher.replay_endpoint,
                "buffer_steps": config.buffer_steps,
                "hwm": 100_000,
                "max_queue_size": 100_000,
                "topic": config.topic,
            }
            for rank, publisher in enumerate(self._publishers)
        }
        return web.json_response(sources)

    async def _server_info(self, request: web.Request) -> web.Response:
        config = self._config
        info: Any = {
            "model_config": {"model": config.model, "max_model_len": config.context_tokens},
            "cache_config": {"block_size": config.block_size, "num_gpu_blocks": config.num_blocks},
            "scheduler_config": {
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": config.max_num_batched_tokens,
            },
            "parallel_config": {"data_parallel_size": config.dp_size},
            "kv_events_config": None,
        }
        if self._publishers:
            first = self._publishers[0]
            info["kv_events_config"] = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": first.events_endpoint,
                "replay_endpoint": first.replay_endpoint,
                "buffer_steps": config.buffer_steps,
                "topic": config.topic,
            }
        if request.query.get("config_format") != "json":
            info = json.dumps(info)
        return web.json_response({"vllm_config": info})

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        results = [engine.blocks.reset() for engine in self._engines]
        return web.json_response({"success": all(results)})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await _json_object(request)
        match body:
            case {"prompt": str(text)}:
                pass
            case {"messages": [*messages]}:
                text = "".join(_render_message(message) for message in messages)
            case _:
                raise bad_request("Either prompt or messages must be given", "prompt")
        tokens = encode_text(text)
        names = [token_text(token) for token in tokens] if body.get("return_token_strs") else None
        length = self._config.context_tokens
        return web.json_response({"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": names})

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await _json_object(request)
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise bad_request("tokens must be a list of token ids", "tokens")
        return web.json_response({"prompt": "".join(map(token_text, tokens))})

    async def _hand_over(self, request: web.Request) -> web.Response:
        tokens = self._transfers.fetch(str((await _json_object(request)).get("request_id")))
        if tokens is None:
            raise not_found("no blocks are kept for that request", "request_id")
        return web.json_response({"num_tokens": tokens})


@web.middleware
async def _api_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        if not error.late:
            return web.Response(status=error.status, body=error.body(), content_type="application/json")
        response = web.StreamResponse(headers=_SSE_HEADERS)
        await response.prepare(request)
        await response.write(error.event() + STREAM_END)
        await response.write_eof()
        return response
    except web.HTTPException as error:  # no such path or method, body too large
        return web.json_response({"detail": error.reason}, status=error.status)


def _request_id(request: web.Request, completion: Completion) -> str:
    return f"cmpl-{request.headers.get('X-Request-Id') or completion.body.request_id or uuid.uuid4().hex[:16]}"


def _render_message(message: Any) -> str:
    if not isinstance(message, dict):
        raise bad_request("every message must be an object with role and content", "messages")
    return f"<{message.get('role', '')}>{message.get('content', '')}</>"


async def _json_object(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise malformed(raw, error) from None
