"""What runs beside a decode engine: prompts computed by the prefill pool, answers streamed by the engine."""

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import aiohttp

from kvrouter_client import KvRouterClient, RoutingHints

from .answer import Answer
from .engine import Engine, EngineError, Json
from .prefill import Ask, Prefill, PrefillPool, Reason, Way

_NOT_TRANSFERABLE = ("n", "best_of", "use_beam_search", "prompt_logprobs", "echo")


class PrefillHandler:
    """Serves completions on one decode engine and has their prompts computed by the prefill pool of a router.

        async with KvRouterClient("router:50051") as router:
            async with PrefillHandler(router, "dynamo.prefill.generate", "http://127.0.0.1:8000") as handler:
                async with handler.complete({"prompt": token_ids, "max_tokens": 64}) as answer:
                    async for event in answer:
                        print(event["choices"])

    A prefill that fails, for whatever reason, leaves the prompt to the decode engine: the caller only sees it in
    `answer.prefill`.

    Args:
        router: The router; its owner closes it.
        endpoint: `namespace.component.endpoint` of the prefill workers.
        decode_url: `http://host:port` of the decode engine.
        way: How prefill workers are reached.
        prefill_timeout_s: Longest prefill, queueing included, before the decode engine computes the prompt.
        silence_s: Longest wait for the decode engine's next event.
        session: For the engines' HTTP connections; one is made and closed with the handler when None.
    """

    def __init__(
        self,
        router: KvRouterClient,
        endpoint: str,
        decode_url: str,
        *,
        way: Way = Way.RESERVATION,
        prefill_timeout_s: float = 60.0,
        silence_s: float = 300.0,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        self._own_session = session is None
        self._session = session or aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),  # below vLLM's 5 s
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._pool = PrefillPool(router, endpoint, way, self._session, prefill_timeout_s)
        self._engine = Engine(decode_url, self._session, silence_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own_session:
            await self._session.close()

    def complete(self, body: Mapping[str, Any], *, request_id: str = "", routing: RoutingHints | None = None) -> Answer:
        """Answer one request of the completions API.

        Args:
            body: The request as vLLM takes it, with `prompt` as a list of token ids. It is always streamed. A prompt
                that cannot be handed over (several answers, beam search, log-probabilities of the prompt, or
                `kv_transfer_params` of the caller's own) is computed by the decode engine.
            request_id: Its name, unique among those in flight; made up when empty.
            routing: What the caller asks of the choice of the prefill worker.

        Returns:
            The answer; nothing is sent before its first event is awaited.

        Raises:
            ValueError: `prompt` is not a list of token ids.
        """
        prompt = body.get("prompt")
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            raise ValueError("prompt must be a list of token ids")
        ask = Ask(
            token_ids=prompt,
            request_id=request_id or uuid.uuid4().hex,
            model=body.get("model") or "",
            cache_salt=body.get("cache_salt") or "",
            priority=body.get("priority"),
            routing=routing,
        )
        answer = Answer(ask.request_id)
        answer.events = self._events(body, ask, answer)
        return answer

    async def _events(self, body: Mapping[str, Any], ask: Ask, answer: Answer) -> AsyncGenerator[Json, None]:
        request: Json = {**body, "stream": True}
        headers = {"X-Request-Id": ask.request_id}
        if _transferable(body):
            async with AsyncExitStack() as kept:
                prefill = await kept.enter_async_context(self._pool.prefill(ask))
                answer.prefill = prefill
                if prefill.remote:
                    started = False
                    try:
                        handed_over = {**request, "kv_transfer_params": prefill.kv_transfer_params}
                        async with aclosing(self._engine.events(handed_over, headers)) as events:
                            async for event in events:
                                yield event
                                if not started:
                                    started = True
                                    await kept.aclose()  # the blocks are fetched
                        return
                    except EngineError as error:
                        if started or error.refused:
                            raise
                        answer.prefill = replace(
                            prefill, kv_transfer_params=None, reason=Reason.TRANSFER, detail=str(error)
                        )
        else:
            answer.prefill = Prefill(None, "", None, "the prompt cannot be handed over")
        async with aclosing(self._engine.events(request, headers)) as events:
            async for event in events:
                yield event


def _transferable(body: Mapping[str, Any]) -> bool:
    """Whether the decode engine can take a computed prompt over."""
    if body.get("kv_transfer_params") is not None:
        return False
    given = {name: body.get(name) for name in _NOT_TRANSFERABLE}
    return all(value in (None, False, 1) for value in given.values())
