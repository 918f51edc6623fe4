"""The request path of a router."""

import json
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from ._gen import common_pb2, router_pb2, router_pb2_grpc
from .channel import DEFAULT_GENERATE_TIMEOUT_S, DEFAULT_TIMEOUT_S, open_channel
from .errors import KvRouterError, rpc_errors
from .replies import OverlapScores, WorkerChoice
from .reservation import Reservation
from .stream import GenerateStream

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

Prompt = str | Iterable[int]
"""Token ids, or text where the endpoint has a tokenizer."""

BatchItem = Prompt | router_pb2.BestWorkerIdRequest
"""One request of a batch: its prompt, or the whole request where there is more to say."""


class KvRouterClient:
    """A connection to one router, safe to share between tasks; keep it for as long as the program runs.

        async with KvRouterClient("router:50051") as router:
            choice = await router.best_worker_id(token_ids)
            async for chunk in router.generate(token_ids, max_tokens=64):
                ...

    Unary calls are retried when the router answers UNAVAILABLE, within their deadline. A stream never is: the
    router itself tries another worker until the first token, and after that only the caller can decide to
    start over.

    Args:
        address: gRPC target, e.g. `router:50051` or `dns:///router-headless:50051`.
        credentials: TLS credentials; None for plain text.
        timeout_s: Deadline of a unary call, retries included.
        generate_timeout_s: Deadline of a whole Generate stream.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        generate_timeout_s: float = DEFAULT_GENERATE_TIMEOUT_S,
    ) -> None:
        self._channel = open_channel(address, credentials)
        self._stub: router_pb2_grpc.KvRouterAsyncStub = router_pb2_grpc.KvRouterStub(self._channel)
        self._timeout_s = timeout_s
        self._generate_timeout_s = generate_timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; calls that are still open are cancelled."""
        await self._channel.close()

    async def best_worker_id(
        self,
        prompt: Prompt,
        *,
        endpoint: str = "",
        model: str = "",
        routing: router_pb2.RoutingHints | None = None,
        router_config_override: router_pb2.RouterConfigOverride | None = None,
        lora_name: str = "",
        cache_salt: str = "",
        block_mm_hashes: Iterable[common_pb2.BlockMultimodalHashes] = (),
        include_candidates: bool = False,
        prefilled: bool = False,
        timeout_s: float | None = None,
    ) -> WorkerChoice:
        """Ask where a request should go. Changes nothing in the router; `reserve` books.

        Args:
            prompt: The prompt.
            endpoint: `namespace.component.endpoint`; may be left out when the router serves one.
            model: Model or LoRA adapter; may be left out when the endpoint has one base model.
            routing: Pins, allowed workers, taints, priorities.
            router_config_override: Change of the policy for this request.
            lora_name: LoRA adapter, folded into the block hashes.
            cache_salt: Salt that keeps a tenant's cache apart, folded into the block hashes.
            block_mm_hashes: Multimodal objects behind the prompt's placeholder tokens.
            include_candidates: List every worker with its cost.
            prefilled: Another worker computes the prompt: decide for decoding only.
            timeout_s: Deadline of this call; the client's when None.

        Raises:
            KvRouterError: The call failed.
        """
        request = router_pb2.BestWorkerIdRequest(
            endpoint=endpoint,
            model=model,
            routing=routing,
            router_config_override=router_config_override,
            lora_name=lora_name,
            cache_salt=cache_salt,
            block_mm_hashes=block_mm_hashes,
            include_candidates=include_candidates,
            prefilled=prefilled,
        )
        _put_prompt(request, prompt)
        with rpc_errors():
            reply = await self._stub.BestWorkerId(request, timeout=self._deadline(timeout_s))
        return WorkerChoice.from_proto(reply)

    async def best_worker_id_batch(
        self, requests: Iterable[BatchItem], *, timeout_s: float | None = None
    ) -> list[WorkerChoice | KvRouterError]:
        """Ask where many requests should go, at a fraction of what as many calls cost.

        Args:
            requests: At most 1,024.
            timeout_s: Deadline of this call; the client's when None.

        Returns:
            For each request, in their order, where it should go, or why that could not be said.

        Raises:
            KvRouterError: The call as a whole failed.
        """
        batch = router_pb2.BestWorkerIdBatchRequest(requests=map(batch_item, requests))
        with rpc_errors():
            reply = await self._stub.BestWorkerIdBatch(batch, timeout=self._deadline(timeout_s))
        return [_outcome(result) for result in reply.results]

    async def best_worker_id_stream(
        self, batches: AsyncIterable[Iterable[BatchItem]]
    ) -> AsyncIterator[list[WorkerChoice | KvRouterError]]:
        """Ask batch after batch over one call, which has no deadline; the next one may be sent before the answer.

            async with aclosing(router.best_worker_id_stream(batches)) as answers:
                async for choices in answers:
                    ...

        Args:
            batches: Each as for `best_worker_id_batch`. What it raises ends the call and is raised here.

        Yields:
            The outcomes of each batch, in the order of the batches.

        Raises:
            KvRouterError: The call failed; UNAVAILABLE when the router shuts down.
        """
        failure: Exception | None = None

        async def messages() -> AsyncIterator[router_pb2.BestWorkerIdStreamRequest]:
            nonlocal failure
            try:
                async for batch in batches:
                    yield router_pb2.BestWorkerIdStreamRequest(requests=map(batch_item, batch))
            except Exception as error:  # noqa: BLE001 - grpc.aio would only write it to its log
                failure = error

        call = self._stub.BestWorkerIdStream(messages())
        try:
            with rpc_errors():
                async for reply in call:
                    yield [_outcome(result) for result in reply.results]
        finally:
            call.cancel()
        if failure is not None:
            raise failure

    def reserve(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        ttl_s: float | None = None,
        endpoint: str = "",
        model: str = "",
        routing: router_pb2.RoutingHints | None = None,
        router_config_override: router_pb2.RouterConfigOverride | None = None,
        lora_name: str = "",
        cache_salt: str = "",
        block_mm_hashes: Iterable[common_pb2.BlockMultimodalHashes] = (),
        include_candidates: bool = False,
        prefilled: bool = False,
        timeout_s: float | None = None,
    ) -> Reservation:
        """Book a request on the best worker, for callers that talk to the worker themselves: `async with`.

        Args:
            prompt: The prompt.
            request_id: Name of the reservation, unique among those open; made up when empty.
            ttl_s: Seconds after which a forgotten reservation expires; the router's default when None.
            endpoint: As for `best_worker_id`, and so are the others.
            model: See there.
            routing: See there.
            router_config_override: See there.
            lora_name: See there.
            cache_salt: See there.
            block_mm_hashes: See there.
            include_candidates: See there.
            prefilled: See there; what is booked is for decoding only as well.
            timeout_s: Deadline of each call of the reservation; the client's when None.
        """
        request = router_pb2.BestWorkerIdRequest(
            reserve=True,
            request_id=request_id or uuid.uuid4().hex,
            endpoint=endpoint,
            model=model,
            routing=routing,
            router_config_override=router_config_override,
            lora_name=lora_name,
            cache_salt=cache_salt,
            block_mm_hashes=block_mm_hashes,
            include_candidates=include_candidates,
            prefilled=prefilled,
        )
        if ttl_s is not None:
            put_seconds(request.ttl, ttl_s)
        _put_prompt(request, prompt)
        return Reservation(self._stub, request, self._deadline(timeout_s))

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        endpoint: str = "",
        model: str = "",
        request_id: str = "",
        stop_conditions: router_pb2.StopConditions | None = None,
        sampling_options: router_pb2.SamplingOptions | None = None,
        output_options: router_pb2.OutputOptions | None = None,
        eos_token_ids: Iterable[int] = (),
        annotations: Iterable[str] = (),
        routing: router_pb2.RoutingHints | None = None,
        router_config_override: router_pb2.RouterConfigOverride | None = None,
        lora_name: str = "",
        cache_salt: str = "",
        block_mm_hashes: Iterable[common_pb2.BlockMultimodalHashes] = (),
        priority: int | None = None,
        kv_transfer_params: Mapping[str, Any] | None = None,
        extra_args: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> GenerateStream:
        """Generate an answer on the best worker and stream it.

        Args:
            prompt: The prompt.
            max_tokens: Short for `stop_conditions.max_tokens`, which it overrides.
            temperature: Short for `sampling_options.temperature`, which it overrides.
            endpoint: `namespace.component.endpoint`; may be left out when the router serves one.
            model: Model or LoRA adapter; may be left out when the endpoint has one base model.
            request_id: Name of the request, sent to the engine; made up by the router when empty.
            stop_conditions: When generation ends.
            sampling_options: How tokens are drawn.
            output_options: What the answer contains beside its tokens.
            eos_token_ids: Token ids that end a sequence.
            annotations: Free marks; `query_instance_id` only decides and sends nothing to a worker.
            routing: Pins, allowed workers, taints, priorities.
            router_config_override: Change of the policy for this request.
            lora_name: LoRA adapter, folded into the block hashes.
            cache_salt: Salt that keeps a tenant's cache apart, folded into the block hashes.
            block_mm_hashes: Multimodal objects behind the prompt's placeholder tokens.
            priority: Priority inside the engine.
            kv_transfer_params: Parameters of a KV transfer, passed to the engine as they are.
            extra_args: Further fields of the engine's request.
            timeout_s: Deadline of the whole stream; the client's `generate_timeout_s` when None.

        Returns:
            The stream; its iteration raises `KvRouterError` when the call fails.
        """
        request = router_pb2.GenerateRequest(
            endpoint=endpoint,
            model=model,
            request_id=request_id,
            stop_conditions=stop_conditions,
            sampling_options=sampling_options,
            output_options=output_options,
            eos_token_ids=eos_token_ids,
            annotations=annotations,
            routing=routing,
            router_config_override=router_config_override,
            lora_name=lora_name,
            cache_salt=cache_salt,
            block_mm_hashes=block_mm_hashes,
            priority=priority,
            kv_transfer_params_json="" if kv_transfer_params is None else json.dumps(kv_transfer_params),
            extra_args_json="" if extra_args is None else json.dumps(extra_args),
        )
        if max_tokens is not None:
            request.stop_conditions.max_tokens = max_tokens
        if temperature is not None:
            request.sampling_options.temperature = temperature
        _put_prompt(request, prompt)
        timeout = self._generate_timeout_s if timeout_s is None else timeout_s
        return GenerateStream(self._stub.Generate(request, timeout=timeout))

    async def get_overlap_scores(
        self,
        prompt: Prompt,
        *,
        endpoint: str = "",
        lora_name: str = "",
        cache_salt: str = "",
        block_mm_hashes: Iterable[common_pb2.BlockMultimodalHashes] = (),
        router_config_override: router_pb2.RouterConfigOverride | None = None,
        timeout_s: float | None = None,
    ) -> OverlapScores:
        """Ask what every worker holds of a prompt. The arguments are those of `best_worker_id`.

        Raises:
            KvRouterError: The call failed.
        """
        request = router_pb2.GetOverlapScoresRequest(
            endpoint=endpoint,
            lora_name=lora_name,
            cache_salt=cache_salt,
            block_mm_hashes=block_mm_hashes,
            router_config_override=router_config_override,
        )
        _put_prompt(request, prompt)
        with rpc_errors():
            reply = await self._stub.GetOverlapScores(request, timeout=self._deadline(timeout_s))
        return OverlapScores.from_proto(reply)

    def _deadline(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s


def _put_prompt(
    request: router_pb2.GenerateRequest | router_pb2.BestWorkerIdRequest | router_pb2.GetOverlapScoresRequest,
    prompt: Prompt,
) -> None:
    """Write the prompt into a request."""
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.extend(prompt)


def batch_item(item: BatchItem) -> router_pb2.BestWorkerIdRequest:
    """A request as it stands in a batch."""
    if isinstance(item, router_pb2.BestWorkerIdRequest):
        return item
    request = router_pb2.BestWorkerIdRequest()
    _put_prompt(request, item)
    return request


def _outcome(result: router_pb2.BestWorkerIdResult) -> WorkerChoice | KvRouterError:
    """What became of one request of a batch."""
    if result.HasField("response"):
        return WorkerChoice.from_proto(result.response)
    return KvRouterError.from_status(result.status)


def put_seconds(duration: "Duration", seconds: float) -> None:
    """Write seconds into a duration, to the nanosecond."""
    duration.FromNanoseconds(round(seconds * 1e9))
