"""Reads the message around the events: `[ts, [event, ...], data_parallel_rank?]`, or a map of the same names."""

from libc.math cimport isfinite
from libc.stdint cimport uint64_t
from libc.string cimport memcmp

from kvrouter_grpc.core.kv_event cimport read_event
from kvrouter_grpc.core.kv_fields cimport Batch, Event
from kvrouter_grpc.core.msgpack cimport (
    ARRAY,
    MAP,
    NEGATIVE,
    NIL,
    REAL,
    TEXT,
    UNSIGNED,
    Cursor,
    Item,
    Span,
    cursor_over,
    item_next,
    item_skip,
    skip_values,
)
from kvrouter_grpc.core.stack cimport stack_push, stack_reset


cdef enum:
    MOST_EVENTS = 1 << 16


cdef enum Reading:
    READ
    NO_BATCH
    TOO_MANY_EVENTS
    NO_MEMORY


cdef struct Envelope:
    bint has_ts
    bint misshapen
    Reading events


cdef inline bint _is(const Item* key, const char* name, size_t size) noexcept nogil:
    return key.value == size and memcmp(key.data, name, size) == 0


cdef inline void _read_ts(Cursor* cursor, Envelope* envelope) noexcept nogil:
    cdef Item item
    item_next(cursor, &item)
    item_skip(cursor, &item)
    envelope.has_ts = True
    if item.kind == REAL:
        envelope.misshapen |= not isfinite(item.real)
    else:
        envelope.misshapen |= item.kind != UNSIGNED and item.kind != NEGATIVE


cdef inline void _read_rank(Cursor* cursor, Envelope* envelope) noexcept nogil:
    # Identity is the connection: the rank is only checked to be one.
    cdef Item item
    item_next(cursor, &item)
    item_skip(cursor, &item)
    envelope.misshapen |= item.kind != UNSIGNED and item.kind != NEGATIVE and item.kind != NIL


cdef inline void _read_events(Cursor* cursor, Envelope* envelope, Batch* batch) noexcept nogil:
    cdef Item item
    cdef uint64_t offset = 0
    cdef uint64_t i
    cdef Event* event
    batch.events.used = 0
    item_next(cursor, &item)
    if item.kind != ARRAY or item.value > MOST_EVENTS:
        envelope.events = TOO_MANY_EVENTS if item.kind == ARRAY else NO_BATCH
        item_skip(cursor, &item)
        return
    envelope.events = READ
    for i in range(item.value):
        event = <Event*>stack_push(&batch.events, sizeof(Event), &offset)
        if event != NULL:
            read_event(cursor, batch, event)
        if event == NULL or batch.full:
            envelope.events = NO_MEMORY
            return
        if cursor.broken:
            return


cdef inline Reading read_batch(Span payload, Batch* batch) noexcept nogil:
    """Reads a whole message into records.

    Returns:
        READ; or why nothing of it may be used.
    """
    cdef Cursor cursor = cursor_over(payload)
    cdef Envelope envelope
    cdef Item item
    cdef Item key
    cdef uint64_t left
    envelope.has_ts = envelope.misshapen = False
    envelope.events = NO_BATCH
    item_next(&cursor, &item)
    if item.kind == ARRAY and item.value >= 2:
        _read_ts(&cursor, &envelope)
        _read_events(&cursor, &envelope, batch)
        if item.value >= 3:
            _read_rank(&cursor, &envelope)
            skip_values(&cursor, item.value - 3)
    elif item.kind == MAP:
        left = item.value
        while left != 0 and not cursor.broken:
            left -= 1
            if item_next(&cursor, &key) != TEXT:
                return NO_BATCH
            if _is(&key, b"ts", 2):
                _read_ts(&cursor, &envelope)
            elif _is(&key, b"events", 6):
                _read_events(&cursor, &envelope, batch)
            elif _is(&key, b"data_parallel_rank", 18):
                _read_rank(&cursor, &envelope)
            else:
                skip_values(&cursor, 1)
    if envelope.events == NO_MEMORY:
        return NO_MEMORY
    if cursor.broken or cursor.at != cursor.end or not envelope.has_ts or envelope.misshapen:
        return NO_BATCH
    return envelope.events


cdef inline void batch_reset(Batch* batch) noexcept nogil:
    """Forgets the message; its memory stays for the next."""
    stack_reset(&batch.events)
    stack_reset(&batch.names)
    stack_reset(&batch.tokens)
    stack_reset(&batch.marks)
    stack_reset(&batch.seqs)
    stack_reset(&batch.bytes)
    batch.full = False
