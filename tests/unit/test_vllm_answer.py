import json
import math
from pathlib import Path

import pytest

from kvrouter_grpc.errors import (
    EngineRejectedError,
    RouterError,
    StreamInterruptedError,
    UpstreamError,
    UpstreamUnavailableError,
)
from kvrouter_grpc.types import EngineChunk, TokenLogprob, Usage
from kvrouter_grpc.upstream.answer import StreamedAnswer, WholeAnswer

WIRE = Path(__file__).parent / "vllm_wire"  # recorded from vLLM 0.32.0
URL = "http://worker:8000"
LIMIT = 1 << 20


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(token_id: int, finish_reason: str | None = None, index: int = 0, **fields: object) -> bytes:
    choice = {"index": index, "text": f"t{token_id}", "token_ids": [token_id], "finish_reason": finish_reason}
    return event(choices=[choice], **fields)


def error(code: object, message: str = "why") -> bytes:
    return event(error={"message": message, "type": "T", "param": None, "code": code})


DONE = b"data: [DONE]\n\n"


def streamed(*reads: bytes, limit: int = LIMIT) -> tuple[list[EngineChunk], StreamedAnswer]:
    answer = StreamedAnswer(URL, limit)
    chunks = []
    for read in reads:
        chunks += answer.feed(read)
        if answer.done or answer.failure:
            return chunks, answer
    return chunks + answer.end(), answer


def failed(answer: StreamedAnswer | WholeAnswer, kind: type[RouterError], *, retriable: bool) -> RouterError:
    assert not answer.done
    assert type(answer.failure) is kind
    assert answer.failure.metadata["worker_url"] == URL
    if isinstance(answer.failure, UpstreamError):
        assert answer.failure.before_first_token is retriable
    return answer.failure


def whole(body: bytes, limit: int = LIMIT) -> tuple[list[EngineChunk], WholeAnswer]:
    answer = WholeAnswer(URL, limit)
    for i in range(0, len(body), 100):
        assert answer.feed(body[i : i + 100]) == []
        if answer.failure:
            return [], answer
    return answer.end(), answer


class TestStreamedAnswer:
    def test_recorded_stream(self) -> None:
        chunks, answer = streamed((WIRE / "stream.sse").read_bytes())
        assert chunks == [
            EngineChunk(token_ids=[23], text="3", usage=Usage(5, 1)),
            EngineChunk(token_ids=[475, 276, 398], text=" removed bends", finish_reason="length", usage=Usage(5, 4, 0)),
        ]
        assert answer.done
        assert answer.failure is None

    def test_recorded_logprobs(self) -> None:
        chunks, answer = streamed((WIRE / "stream_logprobs.sse").read_bytes())
        first = TokenLogprob(23, "", -2.60102915763855)
        assert (chunks[0].logprobs, chunks[0].top_logprobs) == ([first], [[first]])
        assert (chunks[1].finish_reason, chunks[1].usage) == ("length", Usage(5, 2, 0))
        assert answer.done

    def test_recorded_refusal_inside_a_stream(self) -> None:
        chunks, answer = streamed((WIRE / "stream_error.sse").read_bytes())
        assert chunks == []
        failure = failed(answer, EngineRejectedError, retriable=False)
        assert failure.message == "the engine refused the request: Token id 99999 is out of vocabulary"
        assert failure.metadata["http_status"] == "400"

    def test_chunks_that_arrive_together_are_handed_on_together(self) -> None:
        answer = StreamedAnswer(URL, LIMIT)
        assert [chunk.token_ids for chunk in answer.feed(token(1) + token(2) + token(3)[:-1])] == [[1], [2]]
        assert [chunk.token_ids for chunk in answer.feed(b"\n" + token(4))] == [[3], [4]]
        assert not answer.done

    def test_the_last_chunk_waits_for_the_totals(self) -> None:
        usage = {"prompt_tokens": 7, "completion_tokens": 2}
        answer = StreamedAnswer(URL, LIMIT)
        answer.feed(token(1))
        assert answer.feed(token(2, "stop")) == []
        (last,) = answer.feed(event(choices=[], usage=usage))
        assert (last.token_ids, last.finish_reason, last.usage) == ([2], "stop", Usage(7, 2))
        assert answer.feed(DONE) == []
        assert answer.done

    def test_the_last_chunk_is_not_lost_when_the_totals_do_not_come(self) -> None:
        for rest, done in ((DONE, True), (b"data: nonsense\n\n", False), (b"", False)):
            answer = StreamedAnswer(URL, LIMIT)
            assert answer.feed(token(1, "stop")) == []
            (last,) = answer.feed(rest) if rest else answer.end()
            assert (last.token_ids, last.finish_reason, answer.done) == ([1], "stop", done)
            assert done or answer.failure is not None

    def test_usage_adds_up_the_answers_of_one_request(self) -> None:
        def usage(tokens: int) -> dict[str, int]:
            return {"prompt_tokens": 7, "completion_tokens": tokens}

        chunks, answer = streamed(
            token(1, usage=usage(1)),
            token(2, index=1, usage=usage(1)),
            token(3, "stop", usage=usage(2)),
            token(4, "length", index=1, usage=usage(2)),
            event(choices=[], usage=usage(4)),
            DONE,
        )
        assert [chunk.usage and chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 4]
        assert [chunk.index for chunk in chunks] == [0, 1, 0, 1]
        assert answer.done

    def test_stop_reason_is_a_token_or_a_string(self) -> None:
        for reason in (5, "</s>", None):
            choice = {"index": 0, "text": "", "finish_reason": "stop", "stop_reason": reason}
            chunks, _ = streamed(event(choices=[choice]))
            assert chunks[0].stop_reason == reason

    def test_logprobs_with_token_texts_get_the_ids_of_the_chosen_tokens(self) -> None:
        logprobs = {
            "tokens": ["a", "b"],
            "token_logprobs": [-0.5, None],
            "top_logprobs": [{"a": -0.5, "c": -0.25, "d": None}, None],
        }
        choice = {"text": "ab", "token_ids": [8, 9], "logprobs": logprobs}
        (chunk,), _ = streamed(event(choices=[choice]))
        assert chunk.logprobs[0] == TokenLogprob(8, "a", -0.5)
        assert (chunk.logprobs[1].token_id, chunk.logprobs[1].token) == (9, "b")
        assert math.isnan(chunk.logprobs[1].logprob)  # vLLM writes NaN as null
        first, second = chunk.top_logprobs
        assert [(entry.token_id, entry.token) for entry in first] == [(None, "c"), (None, "a"), (None, "d")]
        assert second == []

    @pytest.mark.parametrize("text", ["token_id:", "token_id:x", "token_id:4294967296", "token_id:٣", "token_id:-1"])
    def test_text_that_looks_like_a_token_id_stays_text(self, text: str) -> None:
        logprobs = {"tokens": [text], "token_logprobs": [-1]}
        (chunk,), _ = streamed(event(choices=[{"logprobs": logprobs}]))
        assert chunk.logprobs == [TokenLogprob(None, text, -1.0)]

    @pytest.mark.parametrize(
        ("code", "before", "after"),
        [
            (400, EngineRejectedError, EngineRejectedError),
            (404, EngineRejectedError, EngineRejectedError),
            (422, EngineRejectedError, EngineRejectedError),
            (429, UpstreamUnavailableError, StreamInterruptedError),
            (500, UpstreamUnavailableError, StreamInterruptedError),
            (503, UpstreamUnavailableError, StreamInterruptedError),
            (None, UpstreamUnavailableError, StreamInterruptedError),
            ("rate_limit", UpstreamUnavailableError, StreamInterruptedError),
            (401, UpstreamError, StreamInterruptedError),
        ],
    )
    def test_error_inside_a_stream(self, code: object, before: type[RouterError], after: type[RouterError]) -> None:
        chunks, answer = streamed(error(code) + DONE)
        assert chunks == []
        failed(answer, before, retriable=True)
        chunks, answer = streamed(token(1) + error(code) + DONE)
        assert len(chunks) == 1  # what came before the error is not lost with it
        failed(answer, after, retriable=False)

    @pytest.mark.parametrize("reason", ["abort", "error"])
    def test_an_engine_that_gives_up_interrupts(self, reason: str) -> None:
        gave_up = event(choices=[{"index": 0, "text": "", "token_ids": [], "finish_reason": reason}])
        chunks, answer = streamed(token(1), gave_up + DONE)
        assert len(chunks) == 1
        failed(answer, StreamInterruptedError, retriable=False)
        chunks, answer = streamed(gave_up + DONE)
        assert chunks == []
        failed(answer, UpstreamUnavailableError, retriable=True)

    @pytest.mark.parametrize("end", [b"", DONE, b"data: [DO", token(2)[:-1]])
    def test_an_answer_without_its_end_is_interrupted(self, end: bytes) -> None:
        chunks, answer = streamed(token(1), end)
        assert len(chunks) == 1
        failed(answer, StreamInterruptedError, retriable=False)

    def test_a_finished_answer_without_done_is_interrupted(self) -> None:
        _, answer = streamed(token(1, "stop"))
        failed(answer, StreamInterruptedError, retriable=False)

    def test_one_of_two_answers_without_its_end_is_interrupted(self) -> None:
        _, answer = streamed(token(1, "stop"), token(2, index=1), DONE)
        failed(answer, StreamInterruptedError, retriable=False)

    def test_a_stream_without_an_answer_may_be_tried_elsewhere(self) -> None:
        # What vLLM sends for a request that waits when the server is told to stop.
        final_usage = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 0})
        chunks, answer = streamed(final_usage + DONE)
        assert chunks == []
        failed(answer, UpstreamUnavailableError, retriable=True)

    @pytest.mark.parametrize(
        "payload",
        [
            b"{",
            b"[]",
            b"null",
            b'"text"',
            b"\xff",
            b'{"choices":[{"text":"\xff"}]}',
            b'{"choices":[{"text":"\\ud800"}]}',
            b'{"choices":null}',
            b'{"choices":[{"text":null}]}',
            b'{"choices":[{"token_ids":[-1]}]}',
            b'{"choices":[{"token_ids":[4294967296]}]}',
            b'{"choices":[{"token_ids":["1"]}]}',
            b'{"choices":[{"index":16384}]}',
            b'{"choices":[{"stop_reason":1.5}]}',
            b'{"choices":[{"logprobs":{"tokens":["a"],"token_logprobs":[]}}]}',
            b'{"usage":{"prompt_tokens":"5"}}',
            b'{"kv_transfer_params":' + b"[" * 100_000,
            b'{"unknown":' + b"[" * 100_000,
        ],
    )
    def test_another_shape_is_the_engines_fault(self, payload: bytes) -> None:
        text = "the worker sent an answer that is not of the vLLM completions API, or exceeds the size limit"
        chunks, answer = streamed(b"data: " + payload + b"\n\n")
        assert chunks == []
        assert failed(answer, UpstreamError, retriable=True).message == text
        chunks, answer = streamed(token(1) + b"data: " + payload + b"\n\n")
        assert len(chunks) == 1
        assert failed(answer, StreamInterruptedError, retriable=False).message == text

    def test_too_large_an_event_is_the_engines_fault(self) -> None:
        _, answer = streamed(token(1), event(choices=[{"text": "a" * 2000}]), limit=1000)
        failed(answer, StreamInterruptedError, retriable=False)

    def test_unknown_fields_and_events_without_news_are_passed_over(self) -> None:
        chunks, answer = streamed(b": ping\n\n", event(id="x", later={"a": [1]}), token(1, "stop", metrics=None), DONE)
        assert len(chunks) == 1
        assert answer.done


class TestWholeAnswer:
    def test_recorded_answer(self) -> None:
        chunks, answer = whole((WIRE / "completion.json").read_bytes())
        assert chunks == [
            EngineChunk(
                token_ids=[23, 475, 276, 398],
                text="3 removed bends",
                finish_reason="length",
                usage=Usage(5, 4, 0),
            )
        ]
        assert answer.done

    def test_transfer_parameters_and_usage_are_on_the_last_chunk(self) -> None:
        prompt_logprobs = [None, {"7": {"logprob": -1.0}}]
        choices = [
            {"index": i, "text": "x", "finish_reason": "length", "prompt_logprobs": prompt_logprobs} for i in (0, 1)
        ]
        params = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "unknown": None}
        body = {"choices": choices, "usage": {"prompt_tokens": 2}, "kv_transfer_params": params}
        (first, last), _ = whole(json.dumps(body).encode())
        assert (first.usage, first.kv_transfer_params) == (None, None)
        assert (last.usage, last.kv_transfer_params) == (Usage(2, 0), params)
        assert first.prompt_logprobs == prompt_logprobs  # the same for all answers, so told once
        assert last.prompt_logprobs is None

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            (b"", UpstreamError),
            (b"{}", UpstreamError),
            (b"<html>", UpstreamError),
            (b'{"choices":[]}', UpstreamError),
            (b'{"choices":[{"text":1}]}', UpstreamError),
            (b'{"choices":[{"text":"x","finish_reason":"abort"}]}', UpstreamUnavailableError),
            (b'{"choices":[{"text":"x"}]}', UpstreamUnavailableError),
            (b'{"error":{"message":"m","code":500}}', UpstreamUnavailableError),
            (b'{"error":{"message":"m","code":400}}', EngineRejectedError),
            (b'{"error":"m"}', UpstreamUnavailableError),
            (b" " * 5000, UpstreamError),
        ],
    )
    def test_faults(self, body: bytes, kind: type[RouterError]) -> None:
        chunks, answer = whole(body, limit=4096)
        assert chunks == []
        failed(answer, kind, retriable=True)


class TestMessages:
    def test_the_engines_text_is_one_printable_line(self) -> None:
        _, answer = streamed(error(400, "a\n  b\x00\u202e\x1b[31m c"))
        assert answer.failure is not None
        assert answer.failure.message == "the engine refused the request: a b???[31m c"

    @pytest.mark.parametrize(("length", "ends"), [(500, "x"), (501, "…"), (100_000, "…")])
    def test_the_engines_text_is_bounded(self, length: int, ends: str) -> None:
        _, answer = streamed(error(400, "x" * length))
        assert answer.failure is not None
        text = answer.failure.message.removeprefix("the engine refused the request: ")
        assert len(text) == 500
        assert text.endswith(ends)

    def test_the_field_that_the_engine_names_is_passed_on(self) -> None:
        _, answer = streamed(event(error={"message": "m", "param": "top_p", "code": 400}))
        assert answer.failure is not None
        assert answer.failure.metadata["param"] == "top_p"

    def test_a_refusal_without_a_reason_says_so(self) -> None:
        _, answer = streamed(error(400, ""))
        assert answer.failure is not None
        assert answer.failure.message == "the engine refused the request: it did not say why"

    def test_the_text_of_an_engines_own_fault_is_not_passed_on(self) -> None:
        _, answer = streamed(error(500, "secret"))
        assert "secret" not in str(answer.failure)
