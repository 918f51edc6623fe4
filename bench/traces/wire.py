"""Prompts and KV events of a trace as bytes: what a router would be given, and what an engine would publish.

A block is told apart by its first token, its id; the other tokens are 0. Engines name a block by its id as well.
"""

from array import array
from collections.abc import Sequence

import msgspec

from bench.traces.cache import Span
from bench.traces.trace import Request, Segment

_encode = msgspec.msgpack.Encoder().encode
Parts = tuple[bytes, bytes]


class Wire:
    """Encodes for blocks of one size; what is known of a segment is kept.

    Args:
        block_size: Tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._zeros = bytes(block_size - 1)
        self._parts: dict[Segment, Parts] = {}

    def prompt(self, request: Request) -> "array[int]":
        """The prompt's tokens; those behind its full blocks are nobody else's, and no block is made of them."""
        tokens = array("I", bytes(4 * request.prompt_tokens))
        place, size = 0, self._size
        for segment in request.path:
            end = place + len(segment.ids) * size
            tokens[place:end:size] = segment.ids
            place = end
        return tokens

    def message(self, stored: Sequence[Span], removed: Sequence[Span]) -> bytes:
        """One message of an engine's event stream, as vLLM 0.24 and later write it."""
        events: list[dict[str, object]] = []
        if removed:
            names = b"".join(self._names(span) for span in removed)
            events.append({"type": "BlockRemoved", "block_hashes": _array(names, len(names) // 5), "medium": "GPU"})
        events += [self._stored(span) for span in stored if span.end > span.start]
        return _encode([0.0, events, 0])

    def _stored(self, span: Span) -> dict[str, object]:
        segment, start, end = span
        before = segment.ids[start - 1] if start else segment.parent.ids[-1] if segment.parent else None
        width = 5 + len(self._zeros)
        tokens = self._of(segment)[1][start * width : end * width]
        return {
            "type": "BlockStored",
            "block_hashes": _array(self._names(span), end - start),
            "parent_block_hash": before,
            "token_ids": _array(tokens, (end - start) * self._size),
            "block_size": self._size,
            "medium": "GPU",
        }

    def _names(self, span: Span) -> bytes:
        return self._of(span.segment)[0][span.start * 5 : span.end * 5]

    def _of(self, segment: Segment) -> Parts:
        parts = self._parts.get(segment)
        if parts is None:
            # 0xce is msgpack's u32, big-endian; a zero is the small integer 0x00.
            words = [b"\xce" + block.to_bytes(4, "big") for block in segment.ids]
            parts = self._parts[segment] = b"".join(words), b"".join([word + self._zeros for word in words])
        return parts


def _array(items: bytes, count: int) -> msgspec.Raw:
    return msgspec.Raw(b"\xdd" + count.to_bytes(4, "big") + items)
