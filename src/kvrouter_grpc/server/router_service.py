"""The service KvRouter: validate, call, convert."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace

from kvrouter_grpc._gen import router_pb2, router_pb2_grpc
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.errors import DrainingError, InvalidRequestError
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server import duration
from kvrouter_grpc.server.boundary import Context, check_request_id, current_request_id
from kvrouter_grpc.server.endpoints import Endpoints
from kvrouter_grpc.server.hints import read_hints, read_override
from kvrouter_grpc.server.opaque_json import read_object
from kvrouter_grpc.server.params import read_params
from kvrouter_grpc.server.prompt import MAX_NAME, PromptRequest, read_prompt, too_long
from kvrouter_grpc.server.reply import AnswerWriter, best_worker_reply, overlap_scores_reply, routing_data
from kvrouter_grpc.server.tokenizer import Tokenizer
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.types import EngineRequest, Prompt
from kvrouter_grpc.upstream.relay import Relay

QUERY_ONLY = "query_instance_id"


class RouterService(router_pb2_grpc.KvRouterServicer):
    """Serves KvRouter.

    Args:
        config: Limits of a request.
        routers: Endpoint to router.
        relay: Forwards to the workers.
        tokenizer: For prompts given as text; None refuses them.

    Attributes:
        draining: Refuse new requests; those in flight go on.
    """

    def __init__(
        self,
        config: ServerConfig,
        routers: Mapping[str, Router],
        relay: Relay,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.draining = False
        self._config = config
        self._endpoints = Endpoints(routers)
        self._relay = relay
        self._tokenizer = tokenizer

    async def Generate(  # noqa: N802 - the names of the rpcs, here and below
        self, request: router_pb2.GenerateRequest, _context: Context
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        """See the contract."""
        self._refuse_when_draining()
        router = self._endpoints.one(request.endpoint)
        violations = Violations()
        check_request_id(request.request_id, violations)
        hints = read_hints(request, router.role, violations)
        params = read_params(request, violations)
        transfer = read_object("kv_transfer_params_json", request.kv_transfer_params_json, violations)
        prompt = await self._read_prompt(request, request.model, router, violations)
        model = router.model_for(request.model, prompt.lora_name)
        request_id = current_request_id()
        if any(mark.partition(":")[0] == QUERY_ONLY for mark in request.annotations):
            decision = router.best_worker(prompt, hints, model=model)
            yield router_pb2.GenerateResponse(routing=routing_data(decision, request_id, attempts=0))
            return
        engine_request = EngineRequest(
            request_id=request_id,
            model=model,
            tokens=prompt.tokens,
            params=params,
            cache_salt=request.cache_salt,
            priority=request.priority if request.HasField("priority") else None,
            kv_transfer_params=transfer,
        )
        writer = AnswerWriter()
        async with aclosing(self._relay.generate(router, prompt, hints, engine_request)) as steps:
            async for step in steps:
                messages = writer.write(step.chunks)
                if step.decision is not None:
                    if not messages:
                        messages = [router_pb2.GenerateResponse()]
                    messages[0].routing.CopyFrom(routing_data(step.decision, request_id, step.attempts))
                for message in messages:
                    yield message

    async def BestWorkerId(  # noqa: N802
        self, request: router_pb2.BestWorkerIdRequest, _context: Context
    ) -> router_pb2.BestWorkerIdResponse:
        """See the contract."""
        self._refuse_when_draining()
        router = self._endpoints.one(request.endpoint)
        violations = Violations()
        check_request_id(request.request_id, violations)
        hints = read_hints(request, router.role, violations)
        ttl_s = duration.read("ttl", request.ttl, violations) if request.HasField("ttl") else None
        if request.reserve and not request.request_id:
            violations.add("request_id", "is empty; a reservation needs a name to be freed by")
        if ttl_s is not None and not request.reserve:
            violations.add("ttl", "is the life of a reservation; set reserve, or leave it out")
        prompt = await self._read_prompt(request, request.model, router, violations)
        model = router.model_for(request.model, prompt.lora_name)
        explain = request.include_candidates
        if not request.reserve:
            decision = router.best_worker(prompt, hints, model=model, explain=explain)
            return best_worker_reply(decision, router.load(decision.target))
        lease = router.lease(request.request_id, prompt, hints, model=model, ttl_s=ttl_s, explain=explain)
        reply = best_worker_reply(lease.decision, router.load(lease.decision.target))
        duration.write(reply.reservation_ttl, lease.expires_in_s)
        return reply

    async def GetOverlapScores(  # noqa: N802
        self, request: router_pb2.GetOverlapScoresRequest, _context: Context
    ) -> router_pb2.GetOverlapScoresResponse:
        """See the contract."""
        router = self._endpoints.one(request.endpoint)
        violations = Violations()
        override = read_override(request, violations)
        prompt = await self._read_prompt(request, "", router, violations)
        if prompt.lora_name:
            router.model_for("", prompt.lora_name)  # an unknown adapter is an error, not zero blocks everywhere
        return overlap_scores_reply(router.overlap_scores(prompt, override))

    async def MarkPrefillComplete(  # noqa: N802
        self, request: router_pb2.MarkPrefillCompleteRequest, _context: Context
    ) -> router_pb2.MarkPrefillCompleteResponse:
        """See the contract."""
        router = self._reserved_on(request)
        router.mark_prefill_complete(request.request_id)
        return router_pb2.MarkPrefillCompleteResponse()

    async def Free(  # noqa: N802
        self, request: router_pb2.FreeRequest, _context: Context
    ) -> router_pb2.FreeResponse:
        """See the contract."""
        router = self._reserved_on(request)
        router.free(request.request_id)
        return router_pb2.FreeResponse()

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise DrainingError("the router is shutting down; send the request to another one")

    def _reserved_on(self, request: router_pb2.MarkPrefillCompleteRequest | router_pb2.FreeRequest) -> Router:
        violations = Violations()
        if not request.request_id:
            violations.add("request_id", "is empty; name the reservation")
        check_request_id(request.request_id, violations)
        violations.raise_if_any()
        return self._endpoints.one(request.endpoint)

    async def _read_prompt(self, request: PromptRequest, model: str, router: Router, violations: Violations) -> Prompt:
        """The prompt. Reads last, so it raises what all readers found."""
        violations.check_text("model", model, MAX_NAME)
        adapter = router.lora_of(model) if model else ""
        if adapter and request.lora_name not in {"", adapter}:
            violations.add("lora_name", f"differs from the adapter that model names ({adapter}); give one")
        lora_name = request.lora_name or adapter
        prompt = read_prompt(
            request,
            lora_name,
            router.index.block_size,
            self._config,
            violations,
            tokenizer=self._tokenizer is not None,
        )
        violations.raise_if_any()
        if request.text and self._tokenizer is not None:
            tokens = await self._tokenizer.encode(request.text)
            if not 0 < len(tokens) <= self._config.max_prompt_tokens:
                text = too_long(len(tokens), self._config) if tokens else "has no tokens"
                raise InvalidRequestError([("text", text)])
            prompt = replace(prompt, tokens=tokens)
        return prompt
