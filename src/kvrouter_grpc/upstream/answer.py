"""Answers of the completions API as pure state machines: bytes in, chunks out, no I/O.

Both kinds are driven alike: `feed` what arrives, `end` when the body ends; hand the chunks on, then look at
`failure` and `done`. Faults are kept, not raised, so that chunks which arrived before a fault reach the
caller before it.
"""

from kvrouter_grpc.errors import RouterError
from kvrouter_grpc.types import EngineChunk, Usage
from kvrouter_grpc.upstream.chunk import (
    Completion,
    CompletionUsage,
    MalformedAnswerError,
    decode_completion,
    engine_chunk,
    engine_usage,
)
from kvrouter_grpc.upstream.failure import engine_error, lost, malformed
from kvrouter_grpc.upstream.sse import EventTooLargeError, SseParser

# The engine stopped by itself (shut down, lost its KV transfer): the answer is not what was asked for. An
# abort that the caller asked for never gets here, since its connection is closed.
_GAVE_UP = frozenset({"abort", "error"})
_INTERNAL_SERVER_ERROR = 500


class Answer:
    """What both kinds share.

    Attributes:
        started: Whether `feed` or `end` gave a chunk.
        done: Whether the answer is complete.
        failure: Why there will be no more chunks, or None.
    """

    __slots__ = ("_max_bytes", "_worker", "done", "failure", "started")

    def __init__(self, worker: str, max_bytes: int) -> None:
        self._worker = worker
        self._max_bytes = max_bytes
        self.started = False
        self.done = False
        self.failure: RouterError | None = None

    def feed(self, data: bytes) -> list[EngineChunk]:
        """Take what arrived; give the chunks it completes."""
        raise NotImplementedError

    def end(self) -> list[EngineChunk]:
        """Take the end of the body; give the chunks it completes."""
        raise NotImplementedError

    def _fail_reported(self, completion: Completion) -> None:
        """Keep the error that the engine reported with status 200."""
        error = completion.error
        code = None if error is None or isinstance(error, str) else error.code
        status = code if isinstance(code, int) else _INTERNAL_SERVER_ERROR
        self.failure = engine_error(self._worker, status, error, started=self.started)


class StreamedAnswer(Answer):
    """A `text/event-stream` of completion chunks that ends with `[DONE]`.

    vLLM sends the totals in an event of their own behind the last tokens. The chunk that ends the answer waits for it,
    so that an answer's last chunk always tells both why it ended and what it cost, however the bytes were cut.

    Args:
        worker: URL of the worker, for the errors.
        max_bytes: Largest event in bytes.
    """

    __slots__ = ("_completion_tokens", "_last", "_open", "_parser")

    def __init__(self, worker: str, max_bytes: int) -> None:
        super().__init__(worker, max_bytes)
        self._parser = SseParser(max_bytes)
        self._open: dict[int, bool] = {}  # index of each answer seen to whether it goes on
        self._completion_tokens: dict[int, int] = {}
        self._last: EngineChunk | None = None  # the chunk that ended the answer, until the totals are here

    def feed(self, data: bytes) -> list[EngineChunk]:
        """Take what arrived; give the chunks it completes."""
        chunks: list[EngineChunk] = []
        try:
            for payload in self._parser.feed(data):
                if payload == b"[DONE]":
                    self._close()
                else:
                    self._take(decode_completion(payload), chunks)
                if self.done or self.failure:
                    break
        except (EventTooLargeError, MalformedAnswerError):
            self.failure = malformed(self._worker, started=self.started)
        if self.done or self.failure:
            self._release(chunks)
        return chunks

    def end(self) -> list[EngineChunk]:
        """Take the end of the body, which is a fault unless `[DONE]` came before."""
        chunks: list[EngineChunk] = []
        if not self.done:
            self.failure = lost(self._worker, started=self.started)
            self._release(chunks)
        return chunks

    def _release(self, chunks: list[EngineChunk]) -> None:
        if self._last is not None:
            chunks.append(self._last)
            self._last = None

    def _close(self) -> None:
        # An engine that shuts down ends the stream in order, but with answers that did not finish or did not
        # start.
        if self._open and not any(self._open.values()):
            self.done = True
        else:
            self.failure = lost(self._worker, started=self.started)

    def _take(self, completion: Completion, chunks: list[EngineChunk]) -> None:
        if completion.error is not None:
            self._fail_reported(completion)
            return
        for choice in completion.choices:
            if choice.finish_reason in _GAVE_UP:
                self.failure = lost(self._worker, started=self.started)
                return
            self._release(chunks)
            self._open[choice.index] = choice.finish_reason is None
            chunk = engine_chunk(choice, self._running_usage(completion.usage, choice.index))
            if any(self._open.values()):
                chunks.append(chunk)
            else:
                self._last = chunk
            self.started = True
        # The last event has no choices, only the final usage. Without an answer before it, it is no sign of
        # life.
        if not completion.choices and completion.usage is not None and self._open:
            usage = engine_usage(completion.usage)
            if self._last is None:
                chunks.append(EngineChunk(usage=usage))
            else:
                self._last.usage = usage
                self._release(chunks)

    def _running_usage(self, usage: CompletionUsage | None, index: int) -> Usage | None:
        """Add up the answers: until its last event vLLM counts the completion tokens of each by itself."""
        if usage is None:
            return None
        total = engine_usage(usage)
        self._completion_tokens[index] = total.completion_tokens
        if len(self._completion_tokens) == 1:
            return total
        return Usage(total.prompt_tokens, sum(self._completion_tokens.values()), total.cached_tokens)


class WholeAnswer(Answer):
    """One JSON document: the answer to a request that does not stream.

    Args:
        worker: URL of the worker, for the errors.
        max_bytes: Largest document in bytes.
    """

    __slots__ = ("_body",)

    def __init__(self, worker: str, max_bytes: int) -> None:
        super().__init__(worker, max_bytes)
        self._body = bytearray()

    def feed(self, data: bytes) -> list[EngineChunk]:
        """Take what arrived; the chunks come at the end."""
        self._body += data
        if len(self._body) > self._max_bytes:
            self.failure = malformed(self._worker, started=False)
        return []

    def end(self) -> list[EngineChunk]:
        """Decode the document: a chunk per answer, the last one with usage and KV transfer parameters."""
        try:
            completion = decode_completion(bytes(self._body))
            for choice in completion.choices[1:]:
                choice.prompt_logprobs = None  # the same as in the first one
            chunks = [engine_chunk(choice) for choice in completion.choices[:-1]]
            if completion.choices:
                usage = None if completion.usage is None else engine_usage(completion.usage)
                chunks.append(engine_chunk(completion.choices[-1], usage, completion.kv_transfer_params))
        except MalformedAnswerError:
            self.failure = malformed(self._worker, started=False)
            return []
        if completion.error is not None:
            self._fail_reported(completion)
        elif not chunks:
            self.failure = malformed(self._worker, started=False)
        elif any(chunk.finish_reason is None or chunk.finish_reason in _GAVE_UP for chunk in chunks):
            self.failure = lost(self._worker, started=False)
        if self.failure:
            return []
        self.started = self.done = True
        return chunks
