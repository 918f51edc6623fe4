"""Snapshots: what is read is what was written, and nothing else is ever read."""

import random
from array import array

import pytest

from kvrouter_grpc.events.sequence import StreamTracker, Verdict
from kvrouter_grpc.routing import snapshot as form
from kvrouter_grpc.routing.forecast import Forecast
from kvrouter_grpc.routing.groups import HeldSlot
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.snapshot import Part, Snapshot, SnapshotError
from kvrouter_grpc.routing.stream import StreamPosition
from kvrouter_grpc.types import Overlap, Prompt, StreamState, Target, Tier
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksRemoved, BlocksStored, CacheCleared

A, B, C = Target(1, 0), Target(2**64 - 1, 3), Target(7, 0)
SIZE = 4
ENDPOINT = "test.backend.generate"
POSITION = StreamPosition(41, 2**64 - 1, 33, partial=False, lost=3)


def make(*targets, block_size=SIZE, **kwargs):
    index = KvIndex(block_size, lambda *_: None, **kwargs)
    for target in targets:
        index.add(target)
    return index


def tokens(words):
    return array("I", [word for word in words for _ in range(SIZE)])


def stored(names, words, parent=None, **kwargs):
    return BlocksStored(array("Q", names), parent, tokens(words), SIZE, **kwargs)


def overlap(index, target, words, **kwargs):
    return index.overlaps(index.sequence(Prompt(tokens(words), **kwargs)), [target])[0]


def filled():
    index = make(A, B, C)
    index.apply_payload(A, encode_batch([stored([1, 2, 3], [1, 2, 3]), stored([4], [9], parent=2)]))
    index.apply_payload(A, encode_batch([BlocksRemoved(array("Q", [1]))]))
    index.apply_payload(B, encode_batch([stored([1, 2], [1, 2]), stored([3], [3], parent=2, tier=Tier.HOST)]))
    index.apply_payload(B, encode_batch([stored([5, 6], [1, 2], lora_name="adapter")]))
    for target in (A, B):
        index.stream(target).position = lambda: POSITION
    return index


def written(index, *targets, started_at=12.5):
    parts = [part for target in targets if (part := Part.of(index, target, started_at)) is not None]
    framed = b"".join(form.framed(part) for part in parts)
    return form.head(ENDPOINT, index.block_size, 99.5) + framed + form.tail(len(parts))


def test_what_is_read_is_what_was_written():
    before = filled()
    snapshot = Snapshot.read(written(before, A, B, C), ENDPOINT)
    assert (snapshot.block_size, snapshot.created_at) == (SIZE, 99.5)
    assert set(snapshot.parts) == {A, B}, "the stream of C could not be taken up again"
    after = make(A, B, C)
    assert snapshot.restore(after, A, 12.5)
    assert snapshot.restore(after, B, None)
    assert not snapshot.restore(after, C, 12.5)
    assert not snapshot.restore(after, A, 12.5), "once only"
    for index in (before, after):
        assert overlap(index, A, [1, 2, 3]) == Overlap()
        assert overlap(index, B, [1, 2, 3]) == Overlap(2, 1)
        assert overlap(index, B, [1, 2, 3], lora_name="adapter") == Overlap(2)
        assert (index.blocks(A), index.blocks(B)) == (3, 5)
        # The engines' names live on: a removal, and a store below a block of before.
        index.apply_payload(A, encode_batch([stored([1], [1])]))
        index.apply_payload(B, encode_batch([BlocksRemoved(array("Q", [2])), stored([8], [7], parent=6)]))
        assert overlap(index, A, [1, 2, 9]) == Overlap(3)
        assert overlap(index, B, [1, 2]) == Overlap(1)
        assert overlap(index, B, [1, 2, 7], lora_name="adapter") == Overlap(3)
        index.apply_payload(B, encode_batch([CacheCleared()]))
        assert index.blocks(B) == 0
    assert after.stream(A).resume_at == POSITION


def test_every_flipped_bit_and_every_truncation_is_refused():
    data = written(filled(), A, B)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(SnapshotError):
            Snapshot.read(bytes(damaged), ENDPOINT)
        with pytest.raises(SnapshotError):
            Snapshot.read(data[:at], ENDPOINT)
    for more in (data + b"\0", data + data, data[: -len(form.tail(0))] + form.tail(3)):
        with pytest.raises(SnapshotError):
            Snapshot.read(more, ENDPOINT)


def test_bytes_that_carry_their_checksum_may_still_lie():
    part = Part.of(filled(), A, None)
    for lie in (
        part._replace(position=POSITION._replace(next_seq=0)),
        part._replace(position=POSITION._replace(next_seq=2**63)),
        part._replace(position=POSITION._replace(known=42)),
        part._replace(slots=(HeldSlot(0, Tier.HOST, b""),) * 257),
        part._replace(groups=part.groups * 257),
    ):
        with pytest.raises(SnapshotError):
            Snapshot.read(form.head(ENDPOINT, SIZE, 0) + form.framed(lie) + form.tail(1), ENDPOINT)
    rng = random.Random(5)
    device = part.slots[0].data
    for _ in range(300):
        image = bytearray(device)
        for _ in range(rng.randint(1, 3)):
            image[rng.randrange(len(image))] = rng.randrange(256)
        held = (HeldSlot(0, Tier.HOST, device), HeldSlot(0, Tier.DEVICE, bytes(image[: rng.randint(1, len(image))])))
        lie = part._replace(slots=held)
        index = make(A)
        try:
            lie.restore(index, None)
        except SnapshotError:
            assert index.blocks(A) == 0
            assert index.stream(A).resume_at is None
        overlap(index, A, [1, 2, 3])
        index.remove(A)
        assert index.stats()["bytes"] == 0


def test_groups_that_cannot_be_are_refused():
    part = Part.of(filled(), A, None)
    (facts,) = part.groups
    for lie in (
        part._replace(groups=()),  # of which the slots would be
        part._replace(groups=(facts,) * 65),
        part._replace(groups=(facts._replace(block_size=SIZE + 1),)),
        part._replace(groups=(facts._replace(block_size=SIZE << 20),)),
    ):
        index = make(A)
        with pytest.raises(SnapshotError):
            Part.decode(memoryview(lie.encode())).restore(index, None)
        assert index.blocks(A) == 0


def test_the_groups_of_a_hybrid_model_come_back():
    index = make(A)
    window = {"group": 0, "kind": "sliding_window", "window": SIZE + 1}
    names, tokens = [1, 2, 3, 4], list(range(4 * SIZE))
    events = [BlocksStored(array("Q", names), None, array("I", tokens), SIZE, **window)]
    events.append(BlocksStored(array("Q", names), None, array("I", tokens), SIZE, group=1, kind="full_attention"))
    gone = BlocksRemoved(array("Q", [4]), group=0)
    index.apply_payload(A, encode_batch([*events, gone]))
    index.stream(A).resume_at = None
    again = make(A)
    again.restore(A, POSITION, *index.write(A))
    seqs = again.sequence(Prompt(array("I", tokens)))
    assert again.overlaps(seqs, [A]) == index.overlaps(seqs, [A]) == [Overlap(3)]
    again.apply_payload(A, encode_batch([BlocksRemoved(array("Q", [3]), group=0)]))
    assert again.overlaps(seqs, [A]) == [Overlap(2)]


@pytest.mark.parametrize(
    ("endpoint", "block_size", "started_at", "why"),
    [
        ("other.backend.generate", SIZE, 12.5, "another endpoint"),
        (ENDPOINT, 2 * SIZE, 12.5, "block size is 4, but the router hashes blocks of 8"),
        (ENDPOINT, None, 12.5, "not known yet"),
        (ENDPOINT, SIZE, 13.0, "restarted"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(endpoint, block_size, started_at, why):
    index = make(A, block_size=block_size)
    with pytest.raises(SnapshotError, match=why):
        Snapshot.read(written(filled(), A), endpoint).restore(index, A, started_at)
    assert index.blocks(A) == 0


def test_orphans_are_left_out_and_leave_the_coverage_partial():
    index = make(A)
    index.apply_payload(A, encode_batch([stored([1], [1]), stored([9], [2], parent=8)]))
    index.stream(A).position = lambda: POSITION
    part = Part.of(index, A, None)
    assert part.position == POSITION._replace(partial=True)


def test_predictions_are_not_what_an_engine_told():
    index = make(A, ahead=Forecast(ttl_s=5, max_blocks=100))
    asked = Prompt(tokens([1, 2, 3]))
    index.apply_payload(A, encode_batch([stored([1], [1])]))
    index.predict(A, index.sequence(asked), asked, 0)
    index.stream(A).position = lambda: POSITION
    after = make(A)
    assert overlap(index, A, [1, 2, 3]) == Overlap(3)
    Part.of(index, A, None).restore(after, None)
    assert overlap(after, A, [1, 2, 3]) == Overlap(1)


@pytest.mark.parametrize("seed", range(8))
def test_a_restored_index_goes_on_like_the_one_before(seed):
    rng = random.Random(seed)
    before, after = make(A), make(A)
    names = []

    def event():
        if names and rng.random() < 0.4:
            return BlocksRemoved(array("Q", rng.choices(names, k=rng.randint(1, 3))))
        new = [rng.randrange(60) for _ in range(rng.randint(1, 4))]
        parent = rng.choice(names) if names and rng.random() < 0.7 else None
        names.extend(new)
        return stored(new, [rng.randrange(2) for _ in new], parent)

    def compare():
        assert before.blocks(A) == after.blocks(A)
        for _ in range(20):
            words = [rng.randrange(2) for _ in range(rng.randint(1, 8))]
            assert overlap(before, A, words) == overlap(after, A, words)

    for _ in range(40):
        before.apply_payload(A, encode_batch([event()]))
    before.stream(A).position = lambda: POSITION
    Part.of(before, A, None).restore(after, None)
    compare()
    for _ in range(40):
        payload = encode_batch([event()])
        before.apply_payload(A, payload)
        after.apply_payload(A, payload)
        if not before.orphans(A):
            compare()


# --- the stream -----------------------------------------------------------------------------------------------------


def tracker(**kwargs):
    options = {"can_replay": True, "max_held": 100, "max_held_bytes": 10_000, "max_attempts": 3}
    return StreamTracker(**(options | kwargs))


def resumed(next_seq=5, process="a", **faults):
    """A tracker that goes on where another one was."""
    before = tracker()
    before.connected()
    answered(before, *range(next_seq), process=process)
    one = tracker()
    one.intake.resume(before.intake.position._replace(**faults))
    one.connected()
    return one


def payload(seq, process="a"):
    return f"{process}{seq}".encode()


def answered(one, *seqs, process="a"):
    """The answer to a replay; the verdicts, and what is taken after each."""
    asked = one.replay_asked()
    verdicts, taken = [], []
    for seq in seqs:
        verdicts.append(one.replayed(seq, payload(seq, process)))
        while (batch := one.intake.take()) is not None:
            taken.append(batch[0])
    if one.replaying:
        verdicts.append(one.replay_ended())
    while (batch := one.intake.take()) is not None:
        taken.append(batch[0])
    return asked, verdicts, taken


def test_the_copy_of_the_last_batch_proves_the_process_and_the_stream_goes_on():
    one = resumed()
    assert one.state is StreamState.SYNCING
    one.live(6, payload(6))
    assert one.intake.take() is None, "nothing is proved yet"
    asked, verdicts, taken = answered(one, 4, 5, 6)
    assert asked == 4
    assert Verdict.RESTART not in verdicts
    assert taken == [5, 6]
    assert (one.state, one.restarts, one.intake.coverage.partial) == (StreamState.LIVE, 0, False)
    assert one.intake.position._replace(content=0) == StreamPosition(7, 0, 7)


@pytest.mark.parametrize("seqs", [(4, 5, 6), ()], ids=["other content", "an empty answer"])
def test_another_process_is_found_out(seqs):
    one = resumed()
    _, verdicts, taken = answered(one, *seqs, process="b")
    assert Verdict.RESTART in verdicts
    assert taken == []
    assert one.intake.next_seq == 0
    _, _, taken = answered(one, 0, 1, 2, process="b")
    assert taken == [0, 1, 2]


def test_a_ring_that_rolled_past_the_proof_is_another_process():
    one = resumed()
    assert Verdict.RESTART not in answered(one, 8, 9)[1]
    assert answered(one, 8, 9)[1][-1] is Verdict.RESTART
    assert answered(one, 8, 9)[2] == [8, 9]
    assert one.intake.coverage.partial


def test_faults_are_passed_on_and_can_be_repaired():
    one = resumed(lost=2, partial=True)
    answered(one, 4)
    assert (one.state, one.intake.coverage.missed, one.intake.coverage.partial) == (StreamState.STALE, 2, True)
    assert one.repairable
    assert one.intake.position._replace(content=0) == StreamPosition(5, 0, 5, partial=True, lost=2)


def test_a_stream_without_replay_or_of_doubtful_origin_has_no_position():
    fresh = tracker()
    assert fresh.position is None
    deaf = tracker(can_replay=False)
    deaf.connected()
    deaf.live(0, payload(0))
    deaf.intake.take()
    assert deaf.position is None
    one = resumed()
    assert one.position is not None, "in the same doubt"
    for _ in range(4):
        if one.wants_replay:
            one.replay_asked()
            one.replay_failed()
    assert one.position is None, "what is taken from now on may be another process's"
