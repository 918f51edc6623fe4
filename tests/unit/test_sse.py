import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.upstream.sse import EventTooLargeError, SseParser


def parse(*reads: bytes, limit: int = 1024) -> list[bytes]:
    parser = SseParser(limit)
    return [payload for read in reads for payload in parser.feed(read)]


@pytest.mark.parametrize(
    ("stream", "payloads"),
    [
        (b"", []),
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),  # one space belongs to the field, the rest to the value
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data\n\n", [b""]),
        (b"data:\ndata:\n\n", [b"\n"]),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b": comment\ndata: a\n: comment\n\n: data: b\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\nunknown\n\n", [b"a"]),
        (b"database: a\n\n", []),
        (b"data: a\n", []),  # cut off before its empty line
        (b"data: a", []),
        (b"data: \xff\x00\n\n", [b"\xff\x00"]),
        (
            b"data: a\x0b\x0cb\xc2\x85c\n\n",
            [b"a\x0b\x0cb\xc2\x85c"],
        ),  # line ends in other standards, not here
    ],
)
def test_parses_as_the_standard_says(stream: bytes, payloads: list[bytes]) -> None:
    assert parse(stream) == payloads
    assert parse(*(stream[i : i + 1] for i in range(len(stream)))) == payloads


def test_carriage_return_and_line_feed_in_different_reads_are_one_line_end() -> None:
    assert parse(b"data: a\r", b"", b"\ndata: b\r", b"\n\r", b"\n") == [b"a\nb"]


@given(st.data())
def test_any_cut_gives_the_same_events(data: st.DataObject) -> None:
    stream = data.draw(
        st.lists(st.sampled_from([b"data: x", b"data:", b"data", b"\n", b"\r\n", b"\r", b":c", b"y"])).map(b"".join)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    reads = [stream[i:j] for i, j in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*reads) == parse(stream)


@given(st.lists(st.binary(max_size=20).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b"")), min_size=1))
def test_payloads_come_back_as_they_were_sent(payloads: list[bytes]) -> None:
    assert parse(b"".join(b"data: " + payload + b"\n\n" for payload in payloads)) == payloads


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"a" * 20,  # a line without an end
        b"data: " + b"a" * 20 + b"\n",
        b": " + b"a" * 20 + b"\n",  # a comment is no way around the limit
        b"data: aaaaa\n" * 4,  # an event without an end
        b"data\n" * 20,
    ],
)
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_what_is_too_large_is_refused_after_the_events_before_it(stream: bytes, step: int) -> None:
    stream = b"data: before\n\n" + stream
    seen: list[bytes] = []
    parser = SseParser(18)

    def feed() -> None:
        for i in range(0, len(stream), step):
            seen.extend(parser.feed(stream[i : i + step]))

    with pytest.raises(EventTooLargeError):
        feed()
    assert seen == [b"before"]


def test_the_largest_allowed_event_passes() -> None:
    line = b"data: " + b"a" * 12
    assert parse(line + b"\n\n", limit=len(line)) == [b"a" * 12]
    assert parse(b"data: 12345678\ndata: 123456789\n\n", limit=18) == [b"12345678\n123456789"]
