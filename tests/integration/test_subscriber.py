"""The subscriber over real sockets, against a small publisher that can lose, stall, restart and speak old dialects."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import zmq
import zmq.asyncio

from integration.small_publisher import Bench, stored
from kvrouter_grpc.routing.stream import StreamStatus, freshness
from kvrouter_grpc.types import StreamState


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    context = zmq.asyncio.Context()
    try:
        async with asyncio.TaskGroup() as group:
            bench = Bench(context, group)
            yield bench
            for task in bench.tasks:
                task.cancel()
            await bench.kill_publisher()
    finally:
        # Terminating waits for every socket that was left open.
        end = threading.Thread(target=context.term, daemon=True)
        end.start()
        await asyncio.to_thread(end.join, 5)
        assert not end.is_alive(), "a socket was left open"


async def test_history_is_fetched_on_connect_and_live_batches_follow(bench: Bench) -> None:
    publisher = bench.start_publisher()
    for _ in range(300):
        await publisher.publish()
    bench.subscribe()
    await bench.until_exact()
    for _ in range(300):
        await publisher.publish()
    await bench.until_exact()
    assert bench.sink.status.batches == 600
    assert bench.sink.status.last_seq == 599
    assert bench.sink.status.last_event_at > 0
    assert publisher.asked == [0]


async def test_an_idle_engine_is_live(bench: Bench) -> None:
    bench.start_publisher()
    bench.subscribe()
    await bench.until_exact()
    evidence = bench.sink.status.evidence(time.monotonic(), blocks=0, orphans=0, accuracy=1.0)
    assert freshness(evidence).value == 1.0


async def test_replies_without_topic(bench: Bench) -> None:
    publisher = bench.start_publisher()
    publisher.topic_in_replay = False
    for _ in range(5):
        await publisher.publish()
    bench.subscribe()
    await bench.until_exact()


async def test_only_the_topic_asked_for_is_received(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe(replay=False, topic="kv-events-of-b")
    while len(bench.sink.numbers) < 3:
        await publisher.publish()
        await publisher.publish(topic=b"kv-events-of-b")
        await asyncio.sleep(0.01)
    assert all(number % 2 for number in bench.sink.numbers)


async def test_a_gap_is_fetched_again(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe()
    await bench.until_exact()
    await publisher.publish()
    await bench.until_exact()
    for lost in (True, True, False, False):
        await publisher.publish(lost=lost)
    await bench.until_exact()
    assert bench.sink.status.gaps == 1
    assert bench.sink.status.missed == 0
    assert publisher.asked == [0, 0]


async def test_a_lost_last_batch_is_found_without_another(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe()
    await bench.until_exact()
    await publisher.publish()
    await bench.until_exact()
    heard_at = bench.sink.status.last_event_at
    await publisher.publish(lost=True)
    await bench.until_exact()
    assert bench.sink.status.last_event_at > heard_at  # so no prompt waits for what was said


async def test_holes_in_the_answer_are_asked_again_once_a_second(bench: Bench) -> None:
    publisher = bench.start_publisher()
    for _ in range(20):
        await publisher.publish()
    publisher.hole = {3, 4, 9, 19}
    loop = asyncio.get_running_loop()
    began = loop.time()
    bench.subscribe()
    await bench.until_exact()
    assert publisher.asked[:2] == [0, 2]
    assert loop.time() - began >= len(publisher.asked) - 1


async def test_restart_on_the_same_ports(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe()
    for _ in range(10):
        await publisher.publish()
    await bench.until_exact()
    publisher = await bench.restart_publisher()
    await bench.until(lambda: bench.disconnects > 0)
    await bench.until_exact()  # nothing published yet: the old blocks are gone all the same
    assert bench.sink.clears == 1
    for _ in range(3):
        await publisher.publish()
    await bench.until_exact()
    assert bench.sink.status.restarts == 1


async def test_restart_that_has_counted_past_the_old_process(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe()
    for _ in range(4):
        await publisher.publish()
    await bench.until_exact()
    publisher = await bench.restart_publisher()
    for seq in range(9):
        await publisher.publish(lost=True, events=[stored(seq)])
        publisher.sent[-1] = msgspec.msgpack.encode([500.0 + seq, [stored(seq)], 0])
    await bench.until_exact()
    assert bench.sink.clears == 1


async def test_restart_without_replay_is_seen_by_its_numbers_or_told(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe(replay=False)
    await bench.until(lambda: "nothing heard" in bench.sink.status.detail)
    while not bench.sink.numbers:  # a subscription takes effect some time after the handshake
        await publisher.publish()
        await asyncio.sleep(0.01)
    await publisher.publish()
    await bench.until(lambda: bench.sink.numbers[-1:] == [len(publisher.sent) - 1])
    bench.subscriber.notify_restarted()
    await bench.until(lambda: bench.sink.clears == 1 and not bench.sink.numbers)
    publisher = await bench.restart_publisher()
    await bench.until(lambda: bench.disconnects > 0 and bench.sink.status.state is not StreamState.SYNCING)
    while not bench.sink.numbers:
        await publisher.publish()
        await asyncio.sleep(0.01)
    await bench.until(lambda: bench.sink.numbers[-1:] == [len(publisher.sent) - 1])
    assert bench.sink.status.state is StreamState.LIVE


async def test_a_rolled_ring_gives_its_suffix(bench: Bench) -> None:
    publisher = bench.start_publisher(ring=10)
    for _ in range(50):
        await publisher.publish()
    bench.subscribe()
    await bench.until(lambda: bench.sink.numbers == list(range(40, 50)))
    await bench.until(lambda: bench.sink.status.state is StreamState.LIVE)
    assert bench.sink.status.partial
    assert bench.sink.status.missed == 0
    await publisher.publish()
    await bench.until(lambda: bench.sink.numbers == list(range(40, 51)))


async def test_a_ring_that_rolls_over_a_gap_leaves_the_stream_stale_but_followed(bench: Bench) -> None:
    publisher = bench.start_publisher(ring=5)
    bench.subscribe()
    for _ in range(5):
        await publisher.publish()
    await bench.until_exact()
    for _ in range(20):
        await publisher.publish(lost=True)
    await publisher.publish()
    await bench.until(lambda: bench.sink.status.state is StreamState.STALE)
    assert bench.sink.numbers == [*range(5), *range(21, 26)]
    assert bench.sink.status.missed == 16
    assert "16 batches" in bench.sink.status.detail
    await publisher.publish()
    await bench.until(lambda: bench.sink.numbers[-1] == 26)


async def test_a_picture_that_foretold_wrongly_is_fetched_again_if_the_ring_has_all_of_it(bench: Bench) -> None:
    publisher = bench.start_publisher()
    subscriber = bench.subscribe()
    for _ in range(5):
        await publisher.publish()
    await bench.until_exact()
    subscriber.resync()
    await bench.until(lambda: bench.sink.clears == 1)
    await bench.until_exact()
    await bench.until(lambda: bench.sink.status.state is StreamState.LIVE)
    publisher.ring = 2
    asked = bench.sink.status.replays
    subscriber.resync()
    await bench.until(lambda: bench.sink.status.replays > asked and bench.sink.status.state is StreamState.STALE)
    await publisher.publish()
    await bench.until(lambda: bench.sink.numbers == [0, 1, 2, 3, 4, 5])
    status = bench.sink.status
    assert (bench.sink.clears, status.resyncs, status.restarts, status.lost) == (1, 2, 0, 0)


@pytest.mark.parametrize(("backoff_s", "asks_again"), [(0.01, True), (30.0, False)])
async def test_an_unanswered_replay_is_asked_for_again_after_a_wait_with_jitter(
    bench: Bench, monkeypatch, backoff_s: float, asks_again: bool
) -> None:
    monkeypatch.setattr("kvrouter_grpc.events.schedule.REPLAY_INTERVAL_S", 0.0)
    drawn: list[tuple[float, float]] = []

    class Dice(random.Random):
        def uniform(self, a: float, b: float) -> float:
            drawn.append((a, b))
            return super().uniform(a, b)

    monkeypatch.setattr(random, "Random", Dice)
    publisher = bench.start_publisher()
    publisher.deaf = True
    bench.subscribe(replay_timeout_s=0.05, replay_backoff_s=backoff_s, replay_backoff_max_s=60)
    await bench.until(lambda: drawn)
    assert drawn[0] == (0.5, 1.0)
    if asks_again:
        await bench.until(lambda: len(publisher.asked) == 2)
    else:
        await asyncio.sleep(0.2)  # several time limits, and none of the first wait
        assert len(publisher.asked) == 1


async def test_a_dead_replay_port_does_not_stop_the_stream_and_its_return_repairs_it(bench: Bench) -> None:
    publisher = bench.start_publisher()
    publisher.deaf = True
    await publisher.publish()
    bench.subscribe(replay_timeout_s=0.1)
    await bench.until(lambda: publisher.asked == [0])
    await publisher.publish()
    await bench.until(lambda: bench.sink.numbers == [1])
    assert bench.sink.status.partial
    publisher.deaf = False
    await bench.until_exact()


async def test_unreadable_batches_are_fetched_again_or_given_up(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe()
    await bench.until_exact()
    await publisher.publish()
    await publisher.publish(payload=b"\xc1garbled on the way")
    await publisher.publish()
    await bench.until_exact()
    assert bench.sink.status.decode_failures == 1
    await publisher.publish(payload=b"\xc1")
    publisher.sent[-1] = b"\xc1"  # the engine itself wrote this
    await publisher.publish()
    await bench.until(lambda: bench.sink.status.state is StreamState.STALE)
    assert bench.sink.numbers == [0, 1, 2, 4]
    assert bench.sink.status.missed == 1
    assert "unreadable" in bench.sink.status.detail


async def test_an_emptied_cache_is_told_whichever_way_the_batch_comes(bench: Bench) -> None:
    publisher = bench.start_publisher()
    await publisher.publish(events=[{"type": "AllBlocksCleared"}])
    bench.subscribe()
    await bench.until(lambda: bench.sink.emptied == 1)
    await publisher.publish(events=[{"type": "AllBlocksCleared"}])
    await bench.until(lambda: bench.sink.emptied == 2)


async def test_misshapen_messages_are_counted(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe()
    await bench.until_exact()
    for message in ([b""], [b"t", b"short", b""], [b"t", b"1" * 8, b"", b"more"], [b""] * 30):
        await publisher.pub.send_multipart(message)
    await publisher.publish()
    await bench.until_exact()
    assert bench.sink.status.decode_failures == 4


async def test_a_message_over_the_limit_is_given_up_and_the_stream_goes_on(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe(max_message_bytes=4096, replay_timeout_s=0.1, stale_after_replays=2)
    await bench.until_exact()
    await publisher.publish()
    await bench.until_exact()
    await publisher.publish(events=[stored(1)] * 200)
    await bench.until(lambda: bench.disconnects > 0)  # ZeroMQ cuts the connection of whoever sends too much
    await bench.until(lambda: bench.sink.status.state is not StreamState.SYNCING)
    while bench.sink.numbers[-1] == 0:
        await publisher.publish()
        await asyncio.sleep(0.1)
    await bench.until(lambda: bench.sink.status.state is StreamState.STALE)
    assert 1 not in bench.sink.numbers
    assert bench.sink.status.missed == 1


async def test_an_address_that_is_none_is_said_not_raised(bench: Bench) -> None:
    bench.start_publisher()
    for address in ("tcp://host", "inproc://somewhere", "http://host:80", ""):
        bench.sink.status = StreamStatus()
        bench.publisher.events = address
        bench.subscribe()
        await bench.until(lambda: "tcp://host:port" in bench.sink.status.detail)
        assert bench.sink.status.state is StreamState.COLD


async def test_a_port_that_speaks_no_zeromq_is_named(bench: Bench) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 100)
        writer.close()

    bench.start_publisher()
    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        bench.publisher.events = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        bench.subscribe()
        await bench.until(lambda: "does not speak ZeroMQ" in bench.sink.status.detail)


async def test_a_storm_is_worked_off_in_slices(bench: Bench) -> None:
    publisher = bench.start_publisher()
    bench.subscribe()
    await bench.until_exact()
    await publisher.publish()
    await bench.until_exact()
    socket = zmq.Socket.shadow(publisher.pub.underlying)
    for seq in range(1, 2_000):  # all at once, while the event loop stands still
        publisher.sent.append(msgspec.msgpack.encode([1.0 + seq, [stored(seq)], 0]))
        socket.send_multipart([b"", seq.to_bytes(8), publisher.sent[-1]])
    most = before = 0
    async with asyncio.timeout(30):
        while len(bench.sink.numbers) < 2_000:
            await asyncio.sleep(0)
            most = max(most, len(bench.sink.numbers) - before)
            before = len(bench.sink.numbers)
    await bench.until_exact()
    assert most < 1_000, "a slice is far less than a millisecond, and a message costs more than a microsecond"
