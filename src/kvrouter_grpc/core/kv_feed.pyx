"""`KvFeed`: from the bytes of an engine's event messages into the tree, in one pass and without objects in between.

    kv_feed.pyx      what events do          kv_batch.pxd    the message around the events
    kv_store.pxd     what one stores         kv_event.pxd    one event, both generations
    orphans.pxd      stores that must wait   kv_fields.pxd   its fields
    lanes.pxd        where blocks are kept   extra_keys.pxd  salts, adapters, images
    cache_group.pxd  groups of a hybrid      kv_tokens.h     token ids, four at a time
    wide.pxd         their larger blocks     kv_words.pxd    names and their meaning
    stack.pxd        memory used again       msgpack.pxd     bytes to numbers and texts
"""

import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.block_hash cimport LARGEST_BLOCK
from kvrouter_grpc.core.cache_group cimport UNPLACED, CacheGroup, group_is_judged, group_tell, groups_told, unit_told
from kvrouter_grpc.core.kv_batch cimport NO_BATCH, NO_MEMORY, TOO_MANY_EVENTS, Reading, batch_reset, read_batch
from kvrouter_grpc.core.kv_event cimport read_event
from kvrouter_grpc.core.kv_fields cimport Batch, Event
from kvrouter_grpc.core.kv_store cimport NO_ROOM, STORED, Stored, event_lane, event_names, store_names, store_tokens
from kvrouter_grpc.core.kv_words cimport EVENT_BROKEN, EVENT_CLEARED, EVENT_REMOVED, EVENT_STORED, KV_TIERS
from kvrouter_grpc.core.lanes cimport (
    lanes_forget,
    lanes_foresee,
    lanes_free,
    lanes_grow,
    lanes_holds,
    lanes_remove,
    lanes_slot,
)
from kvrouter_grpc.core.msgpack cimport Cursor, Span, cursor_over
from kvrouter_grpc.core.orphans cimport (
    Orphan,
    lot_clear,
    lot_gather,
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
from kvrouter_grpc.core.target cimport MOST_GROUPS

# By `spec`. What is "other" cannot be judged, what is "nothing" has no part in a prefix.
KINDS = ("", "prefix", "window", "state", "nothing", "other")

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

    def __cinit__(self, learn, place, arrange):
        lot_init(&self.lot, SALT)
        self.learn = learn
        self.place = place
        self.arrange = arrange

    def __dealloc__(self):
        lot_clear(&self.lot)
        lanes_free(&self.lanes, &self.lot.meter)

    @property
    def orphans(self):
        """Blocks that wait for their parent."""
        return self.lot.blocks

    @property
    def adopted(self):
        """Orphans whose parent appeared."""
        return self.lot.adopted

    @property
    def dropped(self):
        """Orphans given up for lack of room."""
        return self.lot.dropped

    @property
    def bytes(self):
        """Memory of the orphans and groups."""
        return self.lot.meter.used

    def adopt(self, RadixTree tree not None, uint32_t index, kind, uint32_t window, uint32_t block_size, slots):
        """A KV cache group is known already, and what it holds is in these slots."""
        cdef CacheGroup* group
        cdef uint32_t tier
        if index >= MOST_GROUPS or kind not in KINDS or block_size > LARGEST_BLOCK or block_size % tree.block_size:
            raise ValueError(f"group {index} of kind {kind!r} with blocks of {block_size} tokens")
        if lanes_grow(&self.lanes, &self.lot.meter, index + 1):
            raise MemoryError
        self.tree = tree
        group = &self.lanes.groups[index]
        group.spec = KINDS.index(kind)
        group.window = window
        group.block_size = block_size
        group.width = block_size // tree.block_size
        for tier, slot in slots.items():
            if tier >= <uint32_t>KV_TIERS:
                raise ValueError(f"tier must be in 0..{KV_TIERS - 1}, not {tier}")
            group.slots[tier] = <int32_t>tree._slot(slot)

    def cache_groups(self):
        """What is known of the KV cache groups, by their index."""
        cdef uint32_t i
        cdef CacheGroup* group
        found = []
        for i in range(self.lanes.group_count):
            group = &self.lanes.groups[i]
            slots = tuple([None if slot == UNPLACED else slot for slot in group.slots])
            found.append((KINDS[group.spec], group.window, group.block_size, group.width, slots))
        return found

    def clear(self):
        """Forgets all that the target holds."""
        cdef uint32_t i
        lot_clear(&self.lot)
        for i in range(self.lanes.group_count):
            self._forget(i)

    def close(self):
        """Ends the feed; its slots are no longer its own."""
        self.closed = True
        lot_clear(&self.lot)
        lanes_free(&self.lanes, &self.lot.meter)

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
        cdef Event* event
        cdef uint64_t first = 0
        cdef uint64_t count
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
            self._meet()
            count = batch.events.used // sizeof(Event)
            for i in range(count):
                if self.closed:
                    break
                event = <Event*>batch.events.data + i
                if i == 0:
                    self._foresee(event)
                if i + 1 < count:
                    self._foresee(event + 1)
                if self.postponed and (event.kind == EVENT_REMOVED or event.kind == EVENT_CLEARED):
                    self._catch_up(first, i)
                    first = i
                self._apply(event, applied)
            if self.postponed:
                self._catch_up(first, count)
        finally:
            self.postponed = False
            batch_reset(&batch)
            if self.rearranged and not self.closed:
                self.rearranged = False
                self.arrange(self.cache_groups())
        return 0

    cdef void _foresee(self, const Event* event) noexcept:
        # Its first look-ups come while the event before it is applied, or its own tokens are hashed.
        if self.tree is not None:
            lanes_foresee(&self.lanes, &self.tree.tree, event, event_names(event, &batch))

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

    # --- KV cache groups -------------------------------------------------------------------------------------------

    cdef int _meet(self) except -1:
        # Makes room for groups that are new, before anything is applied: a model that has several tells of all of them
        # in one message, and then the tree has to count in a unit that divides the blocks of all.
        cdef uint32_t count = groups_told(&batch, self.lanes.group_count)
        cdef uint32_t unit
        if count == self.lanes.group_count:
            return 0
        if lanes_grow(&self.lanes, &self.lot.meter, count):
            raise MemoryError
        self.rearranged = True
        if self.tree is None and count > 1:
            unit = unit_told(&batch)
            if unit != 0:
                self.tree = self.learn(unit, True)
        return 0

    cdef void _forget(self, uint32_t group) noexcept:
        # Drops all that a group holds.
        if self.tree is not None:
            lanes_forget(&self.lanes, &self.tree.tree, group)

    cdef bint _learn(self, uint32_t index, uint32_t block_size) except? False:
        # Whether blocks of this size, new for the group, are indexed.
        cdef CacheGroup* group = &self.lanes.groups[index]
        cdef RadixTree tree
        if self.lanes.group_count > 1 and block_size < group.block_size:
            return False  # the tail of a prompt in a part of a block: no hit ends there
        tree = self.learn(block_size, self.lanes.group_count > 1)
        if tree is None or self.closed or block_size % tree.block_size:
            return False
        self.tree = tree
        self._forget(index)
        group.block_size = block_size
        group.width = block_size // tree.block_size
        self.rearranged = True
        return True

    cdef int _place(self, uint32_t lane) except -1:
        cdef int32_t slot = <int32_t>self.tree._slot(self.place(lane // KV_TIERS, lane % KV_TIERS))
        if self.closed:
            raise ValueError("the feed was closed while it asked for a slot")
        self.lanes.groups[lane // KV_TIERS].slots[lane % KV_TIERS] = slot
        self.rearranged = True
        return 0

    # --- stores --------------------------------------------------------------------------------------------------

    cdef int _stored(self, Event* event) except -1:
        cdef CacheGroup* group = &self.lanes.groups[event.group]
        cdef uint32_t lane = event_lane(event)
        if group_tell(group, event):
            self._forget(event.group)  # what it held was to be judged in another way
            self.rearranged = True
        if not group_is_judged(group):
            return 0
        if event.block_size != group.block_size and (event.has_tokens or (self.lanes.group_count > 1 and event.block_size)):
            if not self._learn(event.group, event.block_size):
                return 0
        if self.tree is None:
            return 0  # blocks without tokens before any with: there is nothing to name them by
        if event.mark_count and group.width > 1:
            event.has_tokens = False  # which of the blocks show the objects is not told
        if not event.has_tokens:
            # The groups of a model tell of a step one after the other, in any order: one that names its blocks by hash
            # alone may have to wait for the one that tells their tokens.
            event.postponed = self.lanes.group_count > 1
            self.postponed |= event.postponed
            return 0 if event.postponed else self._store_known(event)
        if lanes_slot(&self.lanes, lane) == UNPLACED:
            self._place(lane)
        if self._store(event):
            return 0 if self.lot.oldest == NULL else self._adopt(event)
        if lot_park(
            &self.lot,
            event.parent,
            lane,
            event_names(event, &batch),
            event.count,
            event.raw,
        ):
            raise MemoryError
        return 0

    cdef int _catch_up(self, uint64_t first, uint64_t end) except -1:
        # Stores what was postponed among these events.
        cdef uint64_t i
        self.postponed = False
        for i in range(first, end):
            if self.closed:
                break
            if (<Event*>batch.events.data + i).postponed:
                self._store_known(<Event*>batch.events.data + i)
        return 0

    cdef bint _store(self, const Event* event) except? False:
        # False: nobody knows the parent.
        cdef Stored stored = store_tokens(&self.lanes, &self.tree.tree, self.tree.block_size, event, &batch)
        if stored == NO_ROOM:
            raise MemoryError("the index is full")
        return stored == STORED

    cdef int _store_known(self, const Event* event) except -1:
        if event.count != 0 and lanes_slot(&self.lanes, event_lane(event)) == UNPLACED:
            self._place(event_lane(event))
        if store_names(&self.lanes, &self.tree.tree, event, &batch) == NO_ROOM:
            raise MemoryError("the index is full")
        return 0

    # --- orphans -------------------------------------------------------------------------------------------------

    cdef int _adopt(self, Event* event) except -1:
        # Stores all that waited for the blocks of `event`, and what waited for those.
        cdef Orphan* pending = lot_gather(&self.lot, event_names(event, &batch), event.count, NULL)
        cdef Orphan* orphan
        cdef bint stored
        try:
            while pending != NULL:
                stored = self._store_orphan(pending)
                orphan = pending
                pending = orphan.next
                if stored:
                    pending = lot_gather(&self.lot, orphan_names(orphan), orphan.count, pending)
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
        cdef CacheGroup* group
        cdef Event event
        cdef uint32_t i
        cdef bint stored
        read_event(&cursor, &batch, &event)
        if event.kind == EVENT_BROKEN:
            raise MemoryError  # it was readable when it was parked
        group = &self.lanes.groups[event.group]
        # The group may be known to be another one by now: then its old blocks are void.
        stored = event.block_size != group.block_size or not group_is_judged(group)
        if not stored:
            stored = self._store(&event)
        batch.names.used = before.names.used
        batch.tokens.used = before.tokens.used
        batch.marks.used = before.marks.used
        if not stored:
            return False
        self.lot.adopted += orphan.count
        for i in range(orphan.count):
            if lot_release(&self.lot, orphan.lane, orphan_names(orphan)[i]):
                self._remove(orphan.lane, &orphan_names(orphan)[i], 1)
        return True

    # --- removals ------------------------------------------------------------------------------------------------

    cdef int _removed(self, Event* event) except -1:
        cdef uint64_t* names = event_names(event, &batch)
        cdef uint32_t lane = event_lane(event)
        cdef uint32_t count = 0
        cdef uint32_t i
        if self.tree is None or event.group >= self.lanes.group_count:
            return 0
        if self.lot.oldest == NULL:
            return self._remove(lane, names, event.count)
        # What the slot does not hold may be waiting to be stored.
        for i in range(event.count):
            if lanes_holds(&self.lanes, &self.tree.tree, lane, names[i]) or not lot_remove(&self.lot, lane, names[i]):
                names[count] = names[i]
                count += 1
        return self._remove(lane, names, count)

    cdef int _remove(self, uint32_t lane, const uint64_t* names, uint32_t count) except -1:
        if lanes_remove(&self.lanes, &self.tree.tree, lane, names, count, &batch.seqs):
            raise MemoryError("the index is full")
        return 0
