"""The service KvRouter: validate, call, convert."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import grpc

from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.core import answer_reply, best_worker_reply, delimited, read_plain
from kvrouter_grpc.errors import DrainingError, InvalidRequestError, RouterError
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server import duration
from kvrouter_grpc.server.boundary import (
    Context,
    Handler,
    check_request_id,
    judge,
    name_call,
    request_id_for,
)
from kvrouter_grpc.server.endpoints import Endpoints
from kvrouter_grpc.server.hints import read_hints, read_override, session_in, tenant_in
from kvrouter_grpc.server.incoming import Asked, AskedReader, Batch, Unreadable, batch_reader, readable, reader
from kvrouter_grpc.server.opaque_json import read_object
from kvrouter_grpc.server.params import read_params
from kvrouter_grpc.server.prompt import MAX_NAME, AskedPrompt, read_prompt, token_end, too_long
from kvrouter_grpc.server.reply import (
    AnswerWriter,
    overlap_scores_reply,
    write_best_worker,
    write_head,
    write_routing_data,
)
from kvrouter_grpc.server.tokenizer import Tokenizer
from kvrouter_grpc.server.violations import Bounds, Violations
from kvrouter_grpc.types import Decision, EngineRequest, Explanation, Prompt, RoutingRequest
from kvrouter_grpc.upstream.relay import Relay
from kvrouter_grpc.upstream.waiting import booked

QUERY_ONLY = "query_instance_id"
MAX_BATCH = 1024
MOST_OUTPUT_TOKENS = 1 << 20
SLICE_S = 0.001
"""How long a batch is worked on before others get their turn."""

RESULTS = router_pb2.BestWorkerIdBatchResponse.RESULTS_FIELD_NUMBER
RESPONSE = router_pb2.BestWorkerIdResult.RESPONSE_FIELD_NUMBER
STATUS = router_pb2.BestWorkerIdResult.STATUS_FIELD_NUMBER


class RouterService:
    """Serves KvRouter.

    Args:
        config: Limits of a request.
        routers: Endpoint to router.
        relay: Forwards to the workers.
        tokenizer: For prompts given as text; None refuses them.
    """

    def __init__(
        self,
        config: ServerConfig,
        routers: Mapping[str, Router],
        relay: Relay,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._config = config
        self._endpoints = Endpoints(routers)
        self._relay = relay
        self._tokenizer = tokenizer
        self._token_end = token_end(config)
        self._read_best = AskedReader(router_pb2.BestWorkerIdRequest)
        self._draining = False
        self._idle: set[asyncio.Timeout] = set()  # of the streams that wait for their next batch

    def handlers(self) -> Mapping[str, Handler]:
        """The methods by their names in the contract, with what reads and writes their messages.

        Methods that are called at a high rate give bytes: they write most of their replies without a message.
        """
        many = batch_reader(MAX_BATCH)
        return {
            "Generate": grpc.unary_stream_rpc_method_handler(self.generate, AskedReader(router_pb2.GenerateRequest)),
            # BestWorkerId reads its requests itself: most of them it need not read as a message.
            "BestWorkerId": grpc.unary_unary_rpc_method_handler(self.best_worker_id),
            "BestWorkerIdBatch": grpc.unary_unary_rpc_method_handler(self.best_worker_id_batch, many),
            "BestWorkerIdStream": grpc.stream_stream_rpc_method_handler(self.best_worker_id_stream, many),
            "GetOverlapScores": grpc.unary_unary_rpc_method_handler(
                self.get_overlap_scores,
                AskedReader(router_pb2.GetOverlapScoresRequest),
                router_pb2.GetOverlapScoresResponse.SerializeToString,
            ),
            "MarkPrefillComplete": grpc.unary_unary_rpc_method_handler(
                self.mark_prefill_complete,
                reader(router_pb2.MarkPrefillCompleteRequest.FromString),
                router_pb2.MarkPrefillCompleteResponse.SerializeToString,
            ),
            "ReportOutput": grpc.unary_unary_rpc_method_handler(
                self.report_output,
                reader(router_pb2.ReportOutputRequest.FromString),
                router_pb2.ReportOutputResponse.SerializeToString,
            ),
            "Free": grpc.unary_unary_rpc_method_handler(
                self.free, reader(router_pb2.FreeRequest.FromString), router_pb2.FreeResponse.SerializeToString
            ),
        }

    def drain(self) -> None:
        """Refuse new requests; those in flight go on."""
        self._draining = True
        for waiting in self._idle:
            waiting.reschedule(0)

    # --- the methods of the contract ------------------------------------------------------------------------------

    async def generate(self, asked: Asked[router_pb2.GenerateRequest], context: Context) -> AsyncGenerator[bytes, None]:
        """See the contract, here and below."""
        self._refuse_when_draining()
        request = asked.message
        request_id = name_call(request.request_id)
        violations = Violations()
        params = read_params(request, violations)
        transfer = read_object("kv_transfer_params_json", request.kv_transfer_params_json, violations)
        router, routing = await self._routing(asked, request_id, violations, context)
        engine_request = EngineRequest(
            request_id=request_id,
            model=routing.model,
            tokens=routing.prompt.tokens,
            params=params,
            cache_salt=request.cache_salt,
            priority=request.priority if request.HasField("priority") else None,
            kv_transfer_params=transfer,
        )
        if any(mark.partition(":")[0] == QUERY_ONLY for mark in request.annotations):
            message = router_pb2.GenerateResponse()
            step = self._relay.preview(router, routing, engine_request)
            write_routing_data(message.routing, cast("Decision", step.decision), request_id, 0, step.prefill)
            yield message.SerializeToString()
            return
        writer = AnswerWriter()
        async with aclosing(self._relay.generate(router, routing, engine_request)) as steps:
            async for step in steps:
                if step.decision is None and len(step.chunks) == 1 and (reply := answer_reply(step.chunks[0])):
                    yield reply
                    continue
                messages = writer.write(step.chunks)
                if step.decision is not None:
                    if not messages:
                        messages = [router_pb2.GenerateResponse()]
                    write_routing_data(messages[0].routing, step.decision, request_id, step.attempts, step.prefill)
                for message in messages:
                    yield message.SerializeToString()

    async def best_worker_id(self, data: bytes, context: Context) -> bytes:
        """Decide one."""
        try:
            return self._decide_plain(data) or await self._decide(readable(self._read_best(data)), context)
        except Exception:
            name_call(self._given_id(data))
            raise

    async def best_worker_id_batch(self, batch: Batch, _context: Context) -> bytes:
        """Decide many."""
        self._refuse_when_draining()
        return await self._decide_all(batch)

    async def best_worker_id_stream(
        self, _batches: AsyncIterator[Batch | Unreadable], context: Context
    ) -> AsyncGenerator[bytes, None]:
        """Decide many, again and again."""
        while (batch := await self._next_batch(context)) is not grpc.aio.EOF:
            yield await self._decide_all(readable(batch))

    async def get_overlap_scores(
        self, asked: Asked[router_pb2.GetOverlapScoresRequest], _context: Context
    ) -> router_pb2.GetOverlapScoresResponse:
        """Look, without deciding."""
        request = asked.message
        router = self._endpoints.one(request.endpoint)
        violations = Violations()
        override = read_override(request, violations)
        prompt = self._read_prompt(asked, "", router, violations)
        if request.text:
            prompt = await self._tokenized(prompt, request.text)
        if prompt.lora_name:
            router.model_for("", prompt.lora_name)  # an unknown adapter is an error, not zero blocks everywhere
        return overlap_scores_reply(router.overlap_scores(prompt, override))

    async def mark_prefill_complete(
        self, request: router_pb2.MarkPrefillCompleteRequest, _context: Context
    ) -> router_pb2.MarkPrefillCompleteResponse:
        """Note the first token of a reservation."""
        router = self._reserved_on(request)
        router.mark_prefill_complete(request.request_id)
        return router_pb2.MarkPrefillCompleteResponse()

    async def report_output(
        self, request: router_pb2.ReportOutputRequest, _context: Context
    ) -> router_pb2.ReportOutputResponse:
        """Note how much of a reservation's answer there is."""
        violations = Violations()
        violations.check_number("output_tokens", request.output_tokens, Bounds(1, MOST_OUTPUT_TOKENS))
        router = self._reserved_on(request, violations)
        router.report_output(request.request_id, request.output_tokens)
        return router_pb2.ReportOutputResponse()

    async def free(self, request: router_pb2.FreeRequest, _context: Context) -> router_pb2.FreeResponse:
        """End a reservation."""
        router = self._reserved_on(request)
        router.free(request.request_id)
        return router_pb2.FreeResponse()

    # --- decisions ------------------------------------------------------------------------------------------------

    def _decide_plain(self, data: bytes, start: int = 0, stop: int = -1) -> bytes | None:
        """The reply to a request that is plain and right, as nearly all are; None for any other.

        The short way to what `_decide` would do; only that one knows all fields and words the refusals.
        """
        plain = read_plain(data, self._config.max_prompt_tokens, self._token_end, start, stop)
        if plain is None or self._draining:
            return None
        tokens, endpoint, model, request_id = plain
        try:
            router = self._endpoints.one(endpoint)
            if router.asks_for_session:
                return None
            seat, choice, load = router.choose(tokens, model, request_id)
        except RouterError:
            return None
        head = seat.reply_head or write_head(seat)
        return best_worker_reply(head, choice, load, len(tokens), router.index.block_size)

    async def _decide(self, asked: Asked[router_pb2.BestWorkerIdRequest], context: Context | None = None) -> bytes:
        """The reply to any request. Gives way to others only when a text is tokenized or a reservation has to wait.

        Args:
            asked: The request.
            context: Of the call, when that is about this request alone.
        """
        self._refuse_when_draining()
        request = asked.message
        violations = Violations()
        ttl_s = duration.read("ttl", request.ttl, violations) if request.HasField("ttl") else None
        if request.reserve and not request.request_id:
            violations.add("request_id", "is empty; a reservation needs a name to be freed by")
        if ttl_s is not None and not request.reserve:
            violations.add("ttl", "is the life of a reservation; set reserve, or leave it out")
        router, routing = await self._routing(asked, request.request_id, violations, context)
        if request.include_candidates or request.prefilled:
            routing = routing._replace(explain=request.include_candidates, prefilled=request.prefilled)
        reply = router_pb2.BestWorkerIdResponse()
        if request.reserve:
            if context is None:  # it would hold up the others of its batch
                routing = routing._replace(hints=replace(routing.hints, may_wait=False))
            lease = await booked(router, routing, ttl_s)
            decision = lease.decision
            duration.write(reply.reservation_ttl, lease.expires_in_s)
        else:
            decision = router.best_worker(routing)
        write_best_worker(reply, decision, router.load(decision.target))
        return reply.SerializeToString()

    async def explain(self, request: router_pb2.BestWorkerIdRequest) -> Explanation:
        """Where a request would go, and why. Raises as BestWorkerId."""
        violations = Violations()
        if request.reserve:
            violations.add("request.reserve", "is set; an explanation books nothing, leave it out")
        asked = readable(self._read_best(request.SerializeToString()))
        router, routing = await self._routing(asked, "", violations, None)
        return router.explain(routing._replace(prefilled=request.prefilled))

    async def _routing(
        self,
        asked: Asked[router_pb2.GenerateRequest] | Asked[router_pb2.BestWorkerIdRequest],
        request_id: str,
        violations: Violations,
        context: Context | None,
    ) -> tuple[Router, RoutingRequest]:
        """Who is asked, and what. Raises what was found before, too."""
        request = asked.message
        router = self._endpoints.one(request.endpoint)
        check_request_id(request.request_id, violations)
        session = self._session_of(context, router, violations)
        tenant = self._tenant_of(context, router, violations)
        hints = read_hints(request, lambda: router.role, violations, session, tenant)
        prompt = self._read_prompt(asked, request.model, router, violations)
        if request.text:
            prompt = await self._tokenized(prompt, request.text)
        return router, RoutingRequest(prompt, hints, router.model_for(request.model, prompt.lora_name), request_id)

    async def _decide_all(self, batch: Batch) -> bytes:
        """The replies to a batch, as the message that is both a BestWorkerIdBatchResponse and a ...StreamResponse."""
        if batch.total > MAX_BATCH:
            text = f"has {batch.total} entries, at most {MAX_BATCH} are allowed; send the others in another batch"
            raise InvalidRequestError([("requests", text)])
        clock = time.monotonic  # uvloop's own stands still within a turn
        turn_ends = clock() + SLICE_S
        results = []
        for start, stop in batch.spans:
            try:
                reply = self._decide_plain(batch.data, start, stop)
                if reply is None:
                    reply = await self._decide(readable(self._read_best(batch.data, start, stop)))
                result = delimited(RESPONSE, reply)
            except Exception as error:  # noqa: BLE001 - the boundary of one request
                request_id = request_id_for(self._given_id(batch.data, start, stop))
                result = delimited(STATUS, judge(error, request_id, "BestWorkerId in a batch").details)
            results.append(delimited(RESULTS, result))
            if clock() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = clock() + SLICE_S
        return b"".join(results)

    def _given_id(self, data: bytes, start: int = 0, stop: int = -1) -> str:
        """The request id in a request that failed."""
        asked = self._read_best(data, start, stop)
        return asked.message.request_id if isinstance(asked, Asked) else ""

    async def _next_batch(self, context: Context) -> Any:
        """The next batch of a stream, `grpc.aio.EOF` at its end.

        Raises:
            DrainingError: The router shuts down; a stream that waits must not hold that up.
        """
        self._refuse_when_draining()
        try:
            async with asyncio.timeout(None) as waiting:
                self._idle.add(waiting)
                try:
                    return await context.read()
                finally:
                    self._idle.discard(waiting)
        except TimeoutError:
            self._refuse_when_draining()
            raise

    # --- requests -------------------------------------------------------------------------------------------------

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise DrainingError("the router is shutting down; send the request to another one")

    def _session_of(self, context: Context | None, router: Router, violations: Violations) -> str:
        """The session that the metadata of a call names, where it matters."""
        if context is None or not router.asks_for_session:
            return ""
        return session_in(context.invocation_metadata() or (), router.config.session_metadata, violations)

    def _tenant_of(self, context: Context | None, router: Router, violations: Violations) -> str | None:
        """The tenant that the metadata of a call names; None where each request names its own."""
        key = router.config.queue_tenant_metadata
        if key is None or router.admission is None:
            return None
        # Requests of a batch never wait, so it does not matter on whose account.
        return tenant_in(context.invocation_metadata() or (), key, violations) if context is not None else ""

    def _reserved_on(
        self,
        request: router_pb2.MarkPrefillCompleteRequest | router_pb2.ReportOutputRequest | router_pb2.FreeRequest,
        violations: Violations | None = None,
    ) -> Router:
        violations = Violations() if violations is None else violations
        if not request.request_id:
            violations.add("request_id", "is empty; name the reservation")
        check_request_id(request.request_id, violations)
        violations.raise_if_any()
        return self._endpoints.one(request.endpoint)

    def _read_prompt(self, asked: AskedPrompt, model: str, router: Router, violations: Violations) -> Prompt:
        """The prompt; without its tokens when it is a text. Reads last, so it raises what all readers found."""
        lora_name = asked.message.lora_name
        violations.check_text("model", model, MAX_NAME)
        adapter = router.lora_of(model) if model else ""
        if adapter and lora_name not in {"", adapter}:
            violations.add("lora_name", f"differs from the adapter that model names ({adapter}); give one")
        prompt = read_prompt(
            asked,
            lora_name or adapter,
            router.index.block_size,
            self._config,
            violations,
            tokenizer=self._tokenizer is not None,
        )
        violations.raise_if_any()
        return prompt

    async def _tokenized(self, prompt: Prompt, text: str) -> Prompt:
        """The prompt with the tokens of its text."""
        tokens = await cast("Tokenizer", self._tokenizer).encode(text)  # without one, texts were refused
        if not 0 < len(tokens) <= self._config.max_prompt_tokens:
            fault = too_long(len(tokens), self._config) if tokens else "has no tokens"
            raise InvalidRequestError([("text", fault)])
        return prompt._replace(tokens=tokens)
