"""Reading ZeroMQ sockets with libzmq itself, over real sockets."""

from collections.abc import Iterator, Sequence

import msgspec
import pytest
import zmq

from kvrouter_grpc.core import KvFeed
from kvrouter_grpc.events.batch_log import BatchLog
from kvrouter_grpc.events.receiver import Delivery, Receiver


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket, Receiver]]:
    with zmq.Context() as context, context.socket(zmq.PAIR) as sender, context.socket(zmq.PAIR) as socket:
        sender.bind("inproc://pair")
        socket.connect("inproc://pair")
        yield sender, Receiver(socket)


def test_nothing_there(pair):
    _, receiver = pair
    assert receiver.receive(4) == []
    assert receiver.drained


def test_messages_come_whole_and_in_order(pair):
    sender, receiver = pair
    sent = [[b"topic", bytes([number]) * 8, b"x" * 300 * number] for number in range(5)] + [[b""], [b"", b""]]
    for message in sent:
        sender.send_multipart(message)
    assert receiver.receive(4) == sent[:4]
    assert not receiver.drained
    assert receiver.receive(4) == sent[4:]
    assert receiver.drained


def test_many_bytes_are_taken_in_several_goes(pair):
    sender, receiver = pair
    for _ in range(5):
        sender.send(b"x" * (400 << 10))
    assert [len(receiver.receive(100)) for _ in range(2)] == [3, 2]


def test_of_many_frames_the_first_are_kept(pair):
    sender, receiver = pair
    sender.send_multipart([b"%d" % number for number in range(1000)])
    sender.send(b"next")
    assert receiver.receive(4) == [[b"%d" % number for number in range(8)], [b"next"]]


def test_a_closed_socket_raises(pair):
    _, receiver = pair
    receiver.socket.close()
    with pytest.raises(zmq.ZMQError):
        receiver.receive(1)


def test_a_terminated_context_raises():
    context = zmq.Context()
    with context.socket(zmq.PAIR) as socket:
        receiver = Receiver(socket)
        context.destroy(linger=0)
        with pytest.raises(zmq.ZMQError):
            receiver.receive(1)


# --- batches -------------------------------------------------------------------------------------------------------


class Live:
    """A live socket and its monitor's, with what was applied: a batch is told by the block size of its one event."""

    def __init__(self, context: zmq.Context) -> None:
        self.sent, self.reported = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self.sockets = [context.socket(zmq.PAIR) for _ in range(2)]
        for name, sender, socket in zip("ab", (self.sent, self.reported), self.sockets, strict=True):
            sender.bind(f"inproc://{name}")
            socket.connect(f"inproc://{name}")
        self.receiver, self.monitor = map(Receiver, self.sockets)
        self.log = BatchLog()
        self.applied: list[int] = []
        self.feed = KvFeed(lambda size, _: self.applied.append(size), lambda *_: 0, lambda _: None)

    def send(self, *seqs: int) -> None:
        for seq in seqs:
            self.sent.send_multipart([b"topic", seq.to_bytes(8), payload(seq)])

    def deliver(self, *, in_order: bool = True) -> Delivery:
        return self.receiver.deliver(self.monitor, self.log, self.feed, in_order)

    def close(self) -> None:
        for socket in (self.sent, self.reported, *self.sockets):
            socket.close()


def payload(seq: int, more: Sequence[dict] = ()) -> bytes:
    stored = {"type": "BlockStored", "block_hashes": [seq], "parent_block_hash": None, "token_ids": [1] * (seq + 1)}
    return msgspec.msgpack.encode([1.0, [stored | {"block_size": seq + 1}, *more], 0])


@pytest.fixture
def live() -> Iterator[Live]:
    with zmq.Context() as context:
        live = Live(context)
        yield live
        live.close()


def test_batches_in_order_are_applied(live):
    live.send(*range(100))
    first, second, third = (live.deliver() for _ in range(3))
    assert (first.batches, second.batches, third.batches) == (64, 36, 0)
    assert live.applied == list(range(1, 101))
    assert live.log.next_seq == 100
    assert live.receiver.drained
    assert [first.left, first.fault, first.misshapen, first.skipped, first.cleared, first.changes] == [
        [],
        "",
        0,
        0,
        False,
        [],
    ]


def test_what_is_out_of_order_is_left_with_all_behind_it(live):
    live.send(0, 1, 3, 2, 4)
    found = live.deliver()
    assert found.batches == 2
    assert found.left == [(seq, payload(seq)) for seq in (3, 2, 4)]
    assert live.applied == [1, 2]


def test_nothing_is_applied_that_need_not_be_in_order(live):
    live.send(0, 1)
    assert [seq for seq, _ in live.deliver(in_order=False).left] == [0, 1]
    assert (live.applied, live.log.next_seq) == ([], 0)


def test_what_the_monitor_says_comes_first(live):
    live.send(0, 1)
    live.reported.send(b"a new connection")
    found = live.deliver()
    assert found.changes == [[b"a new connection"]]
    assert [seq for seq, _ in found.left] == [0, 1]
    assert live.applied == []


def test_an_unreadable_batch_ends_the_delivery(live):
    live.send(0)
    live.sent.send_multipart([b"", (1).to_bytes(8), b"\xc1"])
    live.send(2)
    found = live.deliver()
    assert (found.batches, live.log.next_seq) == (2, 2)
    assert "not a KV event batch" in found.fault
    assert [seq for seq, _ in found.left] == [2]
    assert live.applied == [1]


def test_misshapen_messages_are_counted_and_left_out(live):
    live.send(0)
    for message in ([b""], [b"t", b"short", b""], [b"t", bytes(8), b"", b"more"], [b"t", b"\xff" * 8, b""], [b""] * 30):
        live.sent.send_multipart(message)
    live.send(1)
    found = live.deliver()
    assert (found.batches, found.misshapen, found.left) == (2, 5, [])


def test_what_the_events_say_is_added_up(live):
    live.sent.send_multipart([b"", (0).to_bytes(8), payload(0, [{"type": "New"}])])
    live.sent.send_multipart([b"", (1).to_bytes(8), payload(1, [{"type": "New"}, {"type": "AllBlocksCleared"}])])
    found = live.deliver()
    assert (found.batches, found.skipped, found.cleared) == (2, 2, True)


def test_large_batches_come_one_at_a_time(live):
    for seq in range(3):
        live.sent.send_multipart([b"", seq.to_bytes(8), payload(seq, [{"type": "New", "more": bytes(1 << 16)}])])
    assert [live.deliver().batches for _ in range(4)] == [1, 1, 1, 0]


def test_a_defect_while_applying_is_not_swallowed(live):
    def learn(_size: int, _several_groups: bool) -> None:
        raise RuntimeError("a defect")

    live.feed = KvFeed(learn, lambda *_: 0, lambda _: None)
    live.send(0)
    with pytest.raises(RuntimeError, match="a defect"):
        live.deliver()
