"""The JSON of an answer: one body, or chunk by chunk."""

from collections.abc import Sequence as Seq
from typing import Any
from zlib import crc32

import msgspec

from kvrouter_grpc.mock_worker.completion import Completion
from kvrouter_grpc.mock_worker.config import FIRST_WORD_TOKEN, MockWorkerConfig
from kvrouter_grpc.mock_worker.sequence import Sequence
from kvrouter_grpc.mock_worker.tokens import EOS_TOKEN, token_text

STREAM_END = b"data: [DONE]\n\n"

Json = dict[str, Any]


class Answer:
    """Renders the sequences of one request as vLLM does."""

    def __init__(
        self, config: MockWorkerConfig, completion: Completion, request_id: str, created: int, sequences: Seq[Sequence]
    ) -> None:
        """Begin an answer.

        Args:
            config: Names and options.
            completion: What was asked.
            request_id: The answer's id, `cmpl-...`.
            created: Seconds since the epoch.
            sequences: All choices, by index.
        """
        self._config = config
        self._completion = completion
        self._sequences = sequences
        self._head: Json = {
            "id": request_id,
            "object": "text_completion",
            "created": created,
            "model": completion.model,
        }
        self._fingerprint = f"vllm-{config.version}-mock"
        self._sent = [0] * len(sequences)  # output tokens per choice
        self._offsets = [0] * len(sequences)  # characters of output per choice
        self._streamed_cached_tokens: int | None = None

    def chunk(self, sequence: Sequence) -> bytes:
        """What is new in one choice, as a server-sent event."""
        tokens, text = sequence.take()
        if self._streamed_cached_tokens is None:
            self._streamed_cached_tokens = sequence.cached_tokens
        index = sequence.index
        with_ids = self._completion.body.return_token_ids
        first = not self._sent[index]
        self._sent[index] += len(tokens)
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens),
            "finish_reason": sequence.finish_reason,
            "stop_reason": sequence.stop_reason,
            "prompt_token_ids": sequence.table.tokens[: sequence.prompt_tokens] if with_ids and first else None,
            "token_ids": tokens if with_ids else None,
        }
        message: Json = {**self._head, "choices": [choice]}
        if self._completion.continuous_usage:
            message["usage"] = _usage(sequence.prompt_tokens, self._sent[index])
        return _event(message)

    def usage_chunk(self) -> bytes:
        """The last chunk before `[DONE]`, for those who asked for usage."""
        usage = self._total_usage()
        if self._config.prompt_tokens_details:
            usage["prompt_tokens_details"] = {"cached_tokens": self._streamed_cached_tokens or 0}
        return _event({**self._head, "choices": [], "usage": usage, "system_fingerprint": self._fingerprint})

    def body(self, kv_transfer_params: Json | None) -> bytes:
        """The whole answer, once every sequence has ended."""
        details = None
        if self._config.prompt_tokens_details:
            cached = self._sequences[-1].cached_tokens or 0
            details = {"cached_tokens": cached, "created_cache_tokens": None, "multimodal_tokens": None}
        return msgspec.json.encode(
            {
                **self._head,
                "choices": [self._choice(sequence) for sequence in self._sequences],
                "service_tier": None,
                "system_fingerprint": self._fingerprint,
                "usage": {
                    **self._total_usage(),
                    "prompt_tokens_details": details,
                    "completion_tokens_details": None,
                },
                "kv_transfer_params": kv_transfer_params,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )

    def _choice(self, sequence: Sequence) -> Json:
        tokens, text = sequence.take()
        with_ids = self._completion.body.return_token_ids
        return {
            "index": sequence.index,
            "text": text,
            "logprobs": self._logprobs(sequence.index, tokens),
            "finish_reason": sequence.finish_reason,
            "stop_reason": sequence.stop_reason,
            "token_ids": tokens if with_ids else None,
            "prompt_logprobs": None,
            "prompt_token_ids": sequence.table.tokens[: sequence.prompt_tokens] if with_ids else None,
            "routed_experts": None,
        }

    def _total_usage(self) -> Json:
        prompts = self._sequences[:: self._completion.body.n]
        return _usage(
            sum(sequence.prompt_tokens for sequence in prompts),
            sum(sequence.output_tokens for sequence in self._sequences),
        )

    def _logprobs(self, index: int, tokens: Seq[int]) -> Json | None:
        count = self._completion.body.logprobs
        if count is None:
            return None
        names, chosen, top, offsets = [], [], [], []
        for token in tokens:
            name = self._token_name(token)
            alternatives = {name: _logprob(token, 0)}
            for rank in range(1, count):
                other = FIRST_WORD_TOKEN + (token + rank) % (self._config.vocab_size - FIRST_WORD_TOKEN)
                alternatives.setdefault(self._token_name(other), _logprob(token, rank))
            names.append(name)
            chosen.append(alternatives[name])
            top.append(alternatives)
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {"text_offset": offsets, "token_logprobs": chosen, "tokens": names, "top_logprobs": top}

    def _token_name(self, token: int) -> str:
        if self._completion.body.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return "</s>" if token == EOS_TOKEN else token_text(token)


def _logprob(token: int, rank: int) -> float:
    """A made-up but fixed value: the chosen token is the likeliest, each alternative less likely."""
    return -0.05 - (crc32(token.to_bytes(4, "little")) % 1000) / 1000 - rank


def _usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def _event(message: Json) -> bytes:
    return b"data: " + msgspec.json.encode(message) + b"\n\n"
