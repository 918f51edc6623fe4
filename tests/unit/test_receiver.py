"""Reading ZeroMQ sockets with libzmq itself, over real sockets."""

from collections.abc import Iterator

import pytest
import zmq

from kvrouter_grpc.events.receiver import Receiver


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
