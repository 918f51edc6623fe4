"""Random damage to the bytes of an engine: nothing but chunks and errors of the router, however the bytes are cut."""

import random
from pathlib import Path

import pytest

from kvrouter_grpc.errors import RouterError
from kvrouter_grpc.upstream.answer import Answer, StreamedAnswer, WholeAnswer

WIRE = Path(__file__).parents[1] / "unit" / "vllm_wire"  # recorded from vLLM 0.32.0
STREAMS = [path.read_bytes() for path in sorted(WIRE.glob("stream*.sse"))]
DOCUMENTS = [(WIRE / name).read_bytes() for name in ("completion.json", "error_404.json", "models.json")]
DICTIONARY = [
    *(b"\r\n", b"\n\n", b"\r", b"data:", b"data: [DONE]\n\n", b": x\n", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\x00"),
    *(
        b"null",
        b"[]",
        b"{}",
        b"-1",
        b"4294967296",
        b"1e999",
        b"NaN",
        b'"abort"',
        b'"finish_reason":"stop"',
        b'"index":9',
    ),
    *(b'{"error":{"code":400}}', b'{"error":"x"}', b"[" * 300, b'"token_id:4294967296"', b'"token_id:7"', b"9" * 400),
]
LIMIT = 4096
ROUNDS = 10_000
BATCHES = 10


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A copy with up to four random edits."""
    edited = bytearray(data)
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(edited) + 1)
        match rng.randrange(5):
            case 0:
                edited[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                edited[at:at] = rng.choice(DICTIONARY)
            case 2:
                del edited[at : at + rng.randrange(40)]
            case 3:
                source = rng.randrange(len(edited) + 1)
                edited[at:at] = edited[source : source + rng.randrange(200)]
            case 4:
                edited[at : at + rng.randrange(12)] = rng.choice(DICTIONARY)
    return bytes(edited)


def outcome(answer: Answer, reads: list[bytes]) -> tuple[str, bool, str]:
    """What a caller would see: chunks, whether the answer is complete, and the failure."""
    chunks = []
    for read in reads:
        chunks += answer.feed(read)
        if answer.done or answer.failure:
            break
    else:
        chunks += answer.end()
    assert answer.done != isinstance(answer.failure, RouterError)
    assert answer.started == bool(chunks)
    for chunk in chunks:  # what the gRPC answer cannot carry must not come through
        chunk.text.encode()
        assert all(0 <= token_id < 2**32 for token_id in chunk.token_ids)
        assert 0 <= chunk.index < 2**31
    failure = answer.failure
    return repr(chunks), answer.done, f"{type(failure).__name__} {failure} {failure and failure.metadata}"


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(1, 12)))
    return [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_streams(batch: int) -> None:
    rng = random.Random(batch)
    seen = set()
    for _ in range(ROUNDS):
        stream = damaged(rng.choice(STREAMS), rng)
        whole = outcome(StreamedAnswer("http://w", LIMIT), [stream])
        assert outcome(StreamedAnswer("http://w", LIMIT), cut(stream, rng)) == whole, stream
        seen.add(whole[2].split()[0])
    # The damage reaches every way out.
    assert seen >= {
        "NoneType",
        "EngineRejectedError",
        "UpstreamError",
        "UpstreamUnavailableError",
        "StreamInterruptedError",
    }


def test_damaged_documents() -> None:
    rng = random.Random(7)
    seen = set()
    for _ in range(ROUNDS):
        document = damaged(rng.choice(DOCUMENTS), rng)
        whole = outcome(WholeAnswer("http://w", LIMIT), [document])
        assert outcome(WholeAnswer("http://w", LIMIT), cut(document, rng)) == whole, document
        seen.add(whole[2].split()[0])
    assert seen >= {"NoneType", "EngineRejectedError", "UpstreamError", "UpstreamUnavailableError"}
