"""`KvFeed`: from the bytes of an engine's event messages into the tree, in one pass and without objects in between.

    kv_feed.pyx   what events do          kv_batch.pxd    the message around the events
    orphans.pxd   stores that must wait   kv_event.pxd    one event, both generations
    stack.pxd     memory used again       kv_fields.pxd   its fields
                                          extra_keys.pxd  salts, adapters, images
                                          kv_words.pxd    names and their meaning
                                          msgpack.pxd     bytes to numbers and texts
"""

import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.block_hash cimport chain_hashes, local_hashes
from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.extra_keys cimport Mark, mark_blocks
from kvrouter_grpc.core.hash_table cimport table_find
from kvrouter_grpc.core.kv_batch cimport NO_BATCH, NO_MEMORY, TOO_MANY_EVENTS, Reading, batch_reset, read_batch
from kvrouter_grpc.core.kv_event cimport read_event
from kvrouter_grpc.core.kv_fields cimport Batch, Event
from kvrouter_grpc.core.kv_words cimport (
    EVENT_BROKEN,
    EVENT_CLEARED,
    EVENT_REMOVED,
    EVENT_STORED,
    KV_TIERS,
    SPEC_OTHER,
    SPEC_PREFIX,
)
from kvrouter_grpc.core.msgpack cimport Cursor, Span, cursor_over
from kvrouter_grpc.core.orphans cimport (
    Orphan,
    lot_adopt,
    lot_clear,
    lot_init,
    lot_link,
    lot_park,
    lot_release,
    lot_remove,
    orphan_event,
    orphan_free,
    orphan_names,
)
from kvrouter_grpc.core.radix_tree cimport RadixTree
from kvrouter_grpc.core.slot cimport slot_clear, slot_copy, slot_remove, slot_store
from kvrouter_grpc.core.stack cimport stack_push
from kvrouter_grpc.core.tree cimport DEEPEST, edge_depth

cdef enum:
    UNPLACED = -1

cdef uint64_t SALT = int.from_bytes(os.urandom(8), "little")

# One message is read at a time, so all feeds share one work space.
cdef Batch batch
memset(&batch, 0, sizeof(batch))


class BatchError(Exception):
    """The engine's fault: a payload that is no event batch. The text names the part and never quotes the payload."""


@cython.final
@cython.freelist(8)
cdef class Applied:
    """What one message did; described in `kv_feed.pyi`."""


@cython.final
cdef class KvFeed:
    """Applies the messages of one target's event stream; the full description is in `kv_feed.pyi`."""

    def __cinit__(self, learn, place):
        cdef int tier
        lot_init(&self.lot, SALT)
        for tier in range(KV_TIERS):
            self.slots[tier] = UNPLACED
        self.learn = learn
        self.place = place

    def __dealloc__(self):
        lot_clear(&self.lot)

    @property
    def orphans(self):
        """Blocks that wait for their parent."""
        return self.lot.blocks

    @property
    def dropped(self):
        """Orphans given up for lack of room."""
        return self.lot.dropped

    @property
    def bytes(self):
        """Memory of the orphans."""
        return self.lot.meter.used

    def adopt(self, RadixTree tree not None, tier, slot):
        """What the target holds in a tier is in this slot already."""
        if not isinstance(tier, int) or not 0 <= tier < KV_TIERS:
            raise ValueError(f"tier must be an integer in 0..{KV_TIERS - 1}, not {tier!r}")
        self.slots[<uint32_t>tier] = <int32_t>tree._slot(slot)
        self.tree = tree
        self.block_size = tree.block_size

    def clear(self):
        """Forgets all that the target holds."""
        cdef int tier
        lot_clear(&self.lot)
        for tier in range(KV_TIERS):
            if self.slots[tier] != UNPLACED:
                slot_clear(&self.tree.tree, <uint32_t>self.slots[tier])

    def close(self):
        """Ends the feed; its slots are no longer its own."""
        cdef int tier
        self.closed = True
        lot_clear(&self.lot)
        for tier in range(KV_TIERS):
            self.slots[tier] = UNPLACED

    def apply(self, bytes payload not None):
        """Applies one message; see `kv_feed.pyi`."""
        cdef Applied applied = Applied.__new__(Applied)
        cdef Span span
        span.data = <const uint8_t*>PyBytes_AS_STRING(payload)
        span.size = <size_t>PyBytes_GET_SIZE(payload)
        self.take(span, applied)
        return applied

    cdef int take(self, Span payload, Applied applied) except -1:
        # Applies one message and adds what it did.
        cdef Reading reading
        cdef uint64_t i
        if self.closed:
            return 0
        try:
            reading = read_batch(payload, &batch)
            if reading == NO_BATCH:
                raise BatchError("the payload is not a KV event batch [ts, events, data_parallel_rank]")
            if reading == TOO_MANY_EVENTS:
                raise BatchError("the batch has too many events")
            if reading == NO_MEMORY:
                raise MemoryError
            for i in range(batch.events.used // sizeof(Event)):
                if self.closed:
                    break
                self._apply(<Event*>batch.events.data + i, applied)
        finally:
            batch_reset(&batch)
        return 0

    cdef int _apply(self, Event* event, Applied applied) except -1:
        if event.kind == EVENT_STORED:
            applied.stored += event.count
            self._stored(event)
        elif event.kind == EVENT_REMOVED:
            applied.removed += event.count
            self._removed(event)
        elif event.kind == EVENT_CLEARED:
            applied.cleared = True
            self.clear()
        else:
            applied.skipped += 1
        return 0

    # --- stores --------------------------------------------------------------------------------------------------

    cdef int _stored(self, Event* event) except -1:
        cdef uint64_t group = <uint64_t>1 << event.group
        if event.spec == SPEC_OTHER:
            self.other_groups |= group
            return 0
        if event.spec == SPEC_PREFIX:
            self.other_groups &= ~group
        if event.has_tokens and event.block_size != self.block_size and not self._learn(event.block_size):
            return 0
        if self.tree is None:
            return 0  # blocks without tokens before any with: there is nothing to name them by
        if self.slots[event.tier] == UNPLACED:
            self._place(event.tier)
        if not event.has_tokens:
            return self._store_known(event)
        if self._store(event):
            return 0 if self.lot.oldest == NULL else self._adopt(event)
        if lot_park(
            &self.lot,
            event.parent,
            event.tier,
            <uint64_t*>(batch.names.data + event.names),
            event.count,
            event.raw,
        ):
            raise MemoryError
        return 0

    cdef bint _learn(self, uint32_t block_size) except? False:
        # Whether blocks of this size are indexed.
        cdef RadixTree tree = self.learn(block_size)
        if tree is None or self.closed:
            return False
        self.tree = tree
        self.block_size = block_size
        return True

    cdef int _place(self, uint32_t tier) except -1:
        self.slots[tier] = <int32_t>self.tree._slot(self.place(tier))
        return 0

    cdef bint _store(self, Event* event) except? False:
        # False: nobody knows the parent.
        cdef uint64_t seed = event.seed
        cdef const uint64_t* parent_seq = NULL
        cdef const uint32_t* tokens = <uint32_t*>(batch.tokens.data + event.tokens)
        cdef uint64_t* seqs
        cdef uint64_t offset = 0
        cdef uint32_t block = 0
        cdef Edge* edge = NULL
        if event.has_parent:
            edge = self._find(event.tier, event.parent, &block)
            if edge == NULL:
                return False
            parent_seq = &edge.run.hashes[edge.start + block]
            seed = edge.run.seed
            block += 1
            if edge_depth(edge) + block + event.count > DEEPEST:
                return True  # deeper than any prompt: left out
        batch.seqs.used = 0
        seqs = <uint64_t*>stack_push(&batch.seqs, event.count * sizeof(uint64_t), &offset)
        if seqs == NULL:
            raise MemoryError
        local_hashes(tokens, event.count, self.block_size, seed, seqs)
        if event.mark_count and mark_blocks(
            <Mark*>(batch.marks.data + event.marks),
            event.mark_count,
            tokens,
            event.count,
            self.block_size,
            seed,
            &batch.bytes,
            seqs,
        ):
            raise MemoryError
        chain_hashes(seqs, event.count, parent_seq)
        if slot_store(
            &self.tree.tree,
            <uint32_t>self.slots[event.tier],
            edge,
            block,
            seed,
            <uint64_t*>(batch.names.data + event.names),
            seqs,
            event.count,
        ):
            raise MemoryError("the index is full")
        return True

    cdef Edge* _find(self, uint32_t tier, uint64_t name, uint32_t* block) noexcept:
        # The tier itself is asked first, then the others, nearest first.
        cdef Edge* edge = self.tree._find(<uint32_t>self.slots[tier], name, block)
        cdef int other
        for other in range(KV_TIERS):
            if edge != NULL:
                break
            if other != <int>tier and self.slots[other] != UNPLACED:
                edge = self.tree._find(<uint32_t>self.slots[other], name, block)
        return edge

    cdef int _store_known(self, Event* event) except -1:
        # An offloaded copy named by hash alone: another tier of the same rank knows what the hash stands for.
        cdef int other
        cdef int64_t known = 0
        for other in range(KV_TIERS):
            if other != <int>event.tier and self.slots[other] != UNPLACED and known == 0:
                known = slot_copy(
                    &self.tree.tree,
                    <uint32_t>self.slots[event.tier],
                    <uint32_t>self.slots[other],
                    <uint64_t*>(batch.names.data + event.names),
                    event.count,
                )
                if known < 0:
                    raise MemoryError("the index is full")
        return 0

    # --- orphans -------------------------------------------------------------------------------------------------

    cdef Orphan* _gather(self, const uint64_t* names, uint32_t count, Orphan* pending) noexcept:
        # Takes out what continues from these blocks, in front of what is pending already.
        cdef Orphan* orphan
        cdef uint32_t i
        for i in range(count):
            orphan = lot_adopt(&self.lot, names[i])
            while orphan != NULL:
                orphan.next = pending
                pending = orphan
                orphan = lot_adopt(&self.lot, names[i])
        return pending

    cdef int _adopt(self, Event* event) except -1:
        # Stores all that waited for the blocks of `event`, and what waited for those.
        cdef Orphan* pending = self._gather(<uint64_t*>(batch.names.data + event.names), event.count, NULL)
        cdef Orphan* orphan
        cdef bint stored
        try:
            while pending != NULL:
                stored = self._store_orphan(pending)
                orphan = pending
                pending = orphan.next
                if stored:
                    pending = self._gather(orphan_names(orphan), orphan.count, pending)
                    orphan_free(&self.lot, orphan)
                elif lot_link(&self.lot, orphan):
                    orphan_free(&self.lot, orphan)
                    raise MemoryError
        finally:
            while pending != NULL:  # there was no memory
                orphan = pending
                pending = orphan.next
                orphan_free(&self.lot, orphan)
        return 0

    cdef bint _store_orphan(self, Orphan* orphan) except? False:
        # False: the parent is gone again, by a removal that was noted for another orphan.
        cdef Cursor cursor = cursor_over(orphan_event(orphan))
        cdef Batch before = batch
        cdef Event event
        cdef uint32_t i
        cdef bint stored
        read_event(&cursor, &batch, &event)
        if event.kind == EVENT_BROKEN:
            raise MemoryError  # it was readable when it was parked
        stored = self._store(&event)
        batch.names.used = before.names.used
        batch.tokens.used = before.tokens.used
        batch.marks.used = before.marks.used
        if not stored:
            return False
        for i in range(orphan.count):
            if lot_release(&self.lot, orphan.tier, orphan_names(orphan)[i]):
                self._remove(orphan.tier, &orphan_names(orphan)[i], 1)
        return True

    # --- removals ------------------------------------------------------------------------------------------------

    cdef int _removed(self, Event* event) except -1:
        cdef uint64_t* names = <uint64_t*>(batch.names.data + event.names)
        cdef int32_t slot = self.slots[event.tier]
        cdef uint32_t count = 0
        cdef uint32_t i
        if self.tree is None or self.other_groups >> event.group & 1:
            return 0
        if self.lot.oldest == NULL:
            return self._remove(event.tier, names, event.count)
        # What the slot does not hold may be waiting to be stored.
        for i in range(event.count):
            if (
                slot != UNPLACED and table_find(&self.tree.tree.slots[slot].names, names[i]) != NULL
            ) or not lot_remove(&self.lot, event.tier, names[i]):
                names[count] = names[i]
                count += 1
        return self._remove(event.tier, names, count)

    cdef int _remove(self, uint32_t tier, const uint64_t* names, uint32_t count) except -1:
        if self.slots[tier] != UNPLACED and count:
            if slot_remove(&self.tree.tree, <uint32_t>self.slots[tier], names, count) < 0:
                raise MemoryError("the index is full")
        return 0
