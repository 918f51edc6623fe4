"""Reads one event into a flat record, without a Python object.

Both generations of vLLM's events are understood, see `kv_words.h`. What is newer than this is skipped.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

from kvrouter_grpc.core.block_hash cimport BASE_SEED, XXH3_64bits_withSeed
from kvrouter_grpc.core.extra_keys cimport Extra, read_extra_keys
from kvrouter_grpc.core.kv_fields cimport (
    Batch,
    Event,
    Told,
    read_block_size,
    read_extra,
    read_field,
    read_group,
    read_hashes,
    read_lora_id,
    read_lora_name,
    read_medium,
    read_parent,
    read_spec,
    read_tokens,
)
from kvrouter_grpc.core.kv_words cimport (
    EVENT_BROKEN,
    EVENT_CLEARED,
    EVENT_REMOVED,
    EVENT_STORED,
    KV_CLEARED_FIELDS,
    KV_COUNT,
    KV_DEVICE,
    KV_KINDS,
    KV_REMOTE,
    KV_REMOVED_FIELDS,
    KV_STORED_FIELDS,
    KV_UNKNOWN,
    kv_step_block_size,
    kv_step_extra,
    kv_step_group,
    kv_step_hashes,
    kv_step_lora_id,
    kv_step_lora_name,
    kv_step_medium,
    kv_step_nil,
    kv_step_parent,
    kv_step_removed,
    kv_step_spec,
    kv_step_stored,
    kv_step_tokens,
    kv_step_type,
    kv_word,
    word_meaning,
)
from kvrouter_grpc.core.msgpack cimport (
    ARRAY,
    MAP,
    TEXT,
    Cursor,
    Item,
    Span,
    item_next,
    item_span,
    skip_values,
)


cdef extern from "<stdio.h>" nogil:
    int snprintf(char* out, size_t size, const char* format, ...)


# --- what a store says as a whole --------------------------------------------------------------------------------


cdef inline uint64_t _seed(const Told* told, Span salt) noexcept nogil:
    cdef uint64_t seed = BASE_SEED
    cdef char name[40]
    cdef int size
    if told.lora_name.size != 0:
        seed += XXH3_64bits_withSeed(told.lora_name.data, told.lora_name.size, 0)
    elif told.has_lora_id:
        # Before 0.14 vLLM told only a number.
        if told.lora_id_is_negative:
            size = snprintf(name, sizeof(name), "lora_id:%lld", <long long>told.lora_id)
        else:
            size = snprintf(name, sizeof(name), "lora_id:%llu", <unsigned long long>told.lora_id)
        seed += XXH3_64bits_withSeed(name, <size_t>size, 0)
    if salt.size != 0:
        seed += XXH3_64bits_withSeed(salt.data, salt.size, 1)
    return seed


cdef inline bint _complete_stored(Batch* batch, Event* event, Told* told) noexcept nogil:
    cdef bint extra_told = told.extra.size != 0 and told.extra.data[0] != 0xC0
    cdef uint64_t blocks
    cdef Extra extra
    memset(&extra, 0, sizeof(extra))
    if told.token_count != 0:
        if event.block_size == 0:
            return False
        blocks = told.token_count // event.block_size
        # Not tokens that would be filed under the wrong name. A sliding-window group stores the blocks of its window
        # but tells the tokens of all, and an offloading tier does not tell the salt of its blocks. Without tokens
        # such blocks are named by what another group or tier said of the same hashes, or not at all.
        event.has_tokens = blocks <= event.count and (event.tier == KV_DEVICE or extra_told)
        if event.has_tokens:
            if extra_told:
                extra.blocks = event.count
                extra.begins_prompt = not event.has_parent
                # An image has been an (id, offset) pair since 0.18; before it was a bare id. `group_idx` dates it.
                extra.bare_ids = not told.has_group
                extra.has_lora_name = told.has_lora_name
                extra.lora_name = told.lora_name
                if not read_extra_keys(told.extra, &batch.marks, &extra):
                    batch.full |= extra.full
                    return False
            if blocks == 0:
                return False
            event.count = <uint32_t>blocks
    event.marks = extra.marks
    event.mark_count = extra.mark_count
    event.seed = _seed(told, extra.salt)
    return True


# --- its fields --------------------------------------------------------------------------------------------------


cdef inline bint _read_kind(Cursor* cursor, Event* event) noexcept nogil:
    cdef Item item
    if item_next(cursor, &item) != TEXT:
        return False
    event.kind = <uint8_t>word_meaning(KV_KINDS, KV_COUNT(KV_KINDS), item_span(&item), EVENT_BROKEN)
    return event.kind != EVENT_BROKEN


cdef inline bint _find_kind(Cursor cursor, uint64_t pairs, Event* event) noexcept nogil:
    # Wherever the kind is, it says how the rest is to be read. The cursor is a copy.
    cdef Item key
    while pairs != 0 and not cursor.broken:
        pairs -= 1
        if item_next(&cursor, &key) != TEXT:
            return False
        if key.value == 4 and memcmp(key.data, b"type", 4) == 0:
            return _read_kind(&cursor, event)
        skip_values(&cursor, 1)
    return False


cdef inline bint _read_usual_store(
    Cursor* cursor, Batch* batch, Event* event, Told* told, uint64_t* left
) noexcept nogil:
    # The fields in the order in which vLLM writes them; one that is not there is passed over. What is nil needs no
    # reading here: nothing has been said yet.
    cdef const uint8_t** at = &cursor.at
    if left[0] != 0 and kv_step_hashes(at, cursor.end):
        left[0] -= 1
        if not read_hashes(cursor, batch, event, told):
            return False
    if left[0] != 0 and kv_step_parent(at, cursor.end):
        left[0] -= 1
        if not read_parent(cursor, event):
            return False
    if left[0] != 0 and kv_step_tokens(at, cursor.end):
        left[0] -= 1
        if not read_tokens(cursor, batch, event, told):
            return False
    if left[0] != 0 and kv_step_block_size(at, cursor.end):
        left[0] -= 1
        if not read_block_size(cursor, event):
            return False
    if left[0] != 0 and kv_step_lora_id(at, cursor.end):
        left[0] -= 1
        if not kv_step_nil(at, cursor.end) and not read_lora_id(cursor, told):
            return False
    if left[0] != 0 and kv_step_medium(at, cursor.end):
        left[0] -= 1
        if not read_medium(cursor, told):
            return False
    if left[0] != 0 and kv_step_lora_name(at, cursor.end):
        left[0] -= 1
        if not kv_step_nil(at, cursor.end) and not read_lora_name(cursor, told):
            return False
    if left[0] != 0 and kv_step_extra(at, cursor.end):
        left[0] -= 1
        if not read_extra(cursor, told):
            return False
    if left[0] != 0 and kv_step_group(at, cursor.end):
        left[0] -= 1
        if not read_group(cursor, event, told):
            return False
    if left[0] != 0 and kv_step_spec(at, cursor.end):
        left[0] -= 1
        if not read_spec(cursor, event):
            return False
    return True


cdef inline bint _read_usual_removal(
    Cursor* cursor, Batch* batch, Event* event, Told* told, uint64_t* left
) noexcept nogil:
    cdef const uint8_t** at = &cursor.at
    if left[0] != 0 and kv_step_hashes(at, cursor.end):
        left[0] -= 1
        if not read_hashes(cursor, batch, event, told):
            return False
    if left[0] != 0 and kv_step_medium(at, cursor.end):
        left[0] -= 1
        if not read_medium(cursor, told):
            return False
    if left[0] != 0 and kv_step_group(at, cursor.end):
        left[0] -= 1
        if not read_group(cursor, event, told):
            return False
    return True


cdef inline bint _read_map(Cursor* cursor, uint64_t pairs, Batch* batch, Event* event, Told* told) noexcept nogil:
    cdef const kv_word* words = KV_CLEARED_FIELDS
    cdef size_t count = KV_COUNT(KV_CLEARED_FIELDS)
    cdef bint readable = True
    cdef Item key
    if kv_step_type(&cursor.at, cursor.end):
        pairs -= 1
        if kv_step_stored(&cursor.at, cursor.end):
            event.kind = EVENT_STORED
            readable = _read_usual_store(cursor, batch, event, told, &pairs)
        elif kv_step_removed(&cursor.at, cursor.end):
            event.kind = EVENT_REMOVED
            readable = _read_usual_removal(cursor, batch, event, told, &pairs)
        else:
            readable = _read_kind(cursor, event)
    else:
        readable = _find_kind(cursor[0], pairs, event)
    if event.kind == EVENT_STORED:
        words = KV_STORED_FIELDS
        count = KV_COUNT(KV_STORED_FIELDS)
    elif event.kind == EVENT_REMOVED:
        words = KV_REMOVED_FIELDS
        count = KV_COUNT(KV_REMOVED_FIELDS)
    while readable and pairs != 0 and not cursor.broken:
        pairs -= 1
        readable = item_next(cursor, &key) == TEXT and read_field(
            cursor, batch, event, told, word_meaning(words, count, item_span(&key), KV_UNKNOWN)
        )
    return readable


cdef inline bint _read_array(Cursor* cursor, uint64_t elements, Batch* batch, Event* event, Told* told) noexcept nogil:
    cdef const kv_word* words = KV_CLEARED_FIELDS
    cdef size_t count = KV_COUNT(KV_CLEARED_FIELDS)
    cdef uint64_t i
    if not _read_kind(cursor, event):
        return False
    if event.kind == EVENT_STORED:
        words = KV_STORED_FIELDS
        count = KV_COUNT(KV_STORED_FIELDS)
    elif event.kind == EVENT_REMOVED:
        words = KV_REMOVED_FIELDS
        count = KV_COUNT(KV_REMOVED_FIELDS)
    for i in range(1, elements):
        if cursor.broken:
            return False
        if not read_field(cursor, batch, event, told, words[i].meaning if i < count else KV_UNKNOWN):
            return False
    return True


cdef inline bint _read_event(Cursor* cursor, Batch* batch, Event* event) noexcept nogil:
    cdef Told told
    cdef Item item
    memset(event, 0, sizeof(Event))
    memset(&told, 0, sizeof(Told))
    item_next(cursor, &item)
    if item.kind == MAP and item.value != 0:
        if not _read_map(cursor, item.value, batch, event, &told):
            return False
    elif item.kind == ARRAY and item.value != 0:
        if not _read_array(cursor, item.value, batch, event, &told):
            return False
    else:
        return False
    if cursor.broken:
        return False
    if event.kind == EVENT_CLEARED:
        return True
    event.tier = <uint8_t>(KV_REMOTE if told.remote else told.tier)
    return told.has_hashes and (event.kind == EVENT_REMOVED or _complete_stored(batch, event, &told))


cdef inline void read_event(Cursor* cursor, Batch* batch, Event* event) noexcept nogil:
    """Reads one event; one that cannot be used becomes EVENT_BROKEN, and the cursor stands behind it all the same."""
    cdef const uint8_t* begin = cursor.at
    if not _read_event(cursor, batch, event):
        event.kind = EVENT_BROKEN
        if not cursor.broken:
            cursor.at = begin
            skip_values(cursor, 1)
    event.raw.data = begin
    event.raw.size = <size_t>(cursor.at - begin)
