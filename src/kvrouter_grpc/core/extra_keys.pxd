"""Takes apart what an engine hashed into each block beside its tokens: LoRA name, images, salt, embeddings.

A key of unknown kind counts as a multimodal object too: its block then matches no prompt, rather than a wrong one.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcmp, memcpy

from kvrouter_grpc.core.block_hash cimport XXH3_64bits_withSeed
from kvrouter_grpc.core.msgpack cimport (
    ARRAY,
    NEGATIVE,
    NIL,
    TEXT,
    UNSIGNED,
    Cursor,
    Item,
    Span,
    cursor_left,
    cursor_over,
    item_next,
    item_skip,
    item_span,
    skip_values,
    text_length,
)
from kvrouter_grpc.core.stack cimport Stack, stack_push


cdef enum:
    LONGEST_NAME = 4096  # characters of a LoRA name or a cache salt
    LARGEST_KEYS = 1 << 16  # bytes of the keys of one block


# A multimodal object in a block.
cdef struct Mark:
    uint64_t hash
    uint64_t block


cdef struct Extra:
    # What the event says
    uint64_t blocks
    Span lora_name
    bint has_lora_name
    bint begins_prompt
    bint bare_ids
    # What its extra keys say
    Span salt  # size 0: none
    uint64_t marks  # offset of the first mark
    uint32_t mark_count
    bint full  # no memory


cdef inline bint _is_digest(Span text) noexcept nogil:
    # 64 hexadecimal digits.
    cdef size_t i
    if text.size != 64:
        return False
    for i in range(64):
        if not (0x30 <= text.data[i] <= 0x39 or 0x41 <= text.data[i] <= 0x46 or 0x61 <= text.data[i] <= 0x66):
            return False
    return True


cdef inline uint64_t _object_hash(Span text) noexcept nogil:
    """The u64 of a multimodal object: the head of a digest given in hex, else a hash of the name (Dynamo's rule)."""
    cdef uint64_t value = 0
    cdef size_t i
    if not _is_digest(text):
        return XXH3_64bits_withSeed(text.data, text.size, 0)
    for i in range(16):
        # Digits are 0x30.., letters 0x41.. and 0x61..: the low bits count, with 9 more for a letter.
        value = value << 4 | ((text.data[i] & 0x0F) + 9 * (text.data[i] >> 6))
    return value


cdef inline bint _mark(Stack* marks, Extra* extra, uint64_t block, uint64_t value) noexcept nogil:
    cdef uint64_t offset = 0
    cdef Mark* mark = <Mark*>stack_push(marks, sizeof(Mark), &offset)
    if mark == NULL:
        extra.full = True
        return False
    if extra.mark_count == 0:
        extra.marks = offset
    extra.mark_count += 1
    mark.block = block
    mark.hash = value
    return True


cdef inline bint _image(Cursor cursor, Item* identifier) noexcept nogil:
    # Whether a key is an (id, offset) pair. The cursor is a copy.
    cdef Item item
    item_next(&cursor, &item)
    if item.kind != ARRAY or item.value != 2 or item_next(&cursor, identifier) != TEXT:
        return False
    item_next(&cursor, &item)
    return (item.kind == UNSIGNED or item.kind == NEGATIVE) and text_length(item_span(identifier)) >= 0


cdef inline bint _read_key(
    Cursor* cursor, Stack* marks, Extra* extra, uint64_t block, bint* lora_name_seen
) noexcept nogil:
    cdef const uint8_t* begin = cursor.at
    cdef Cursor copy = cursor[0]
    cdef Item item
    cdef Span key
    item_next(cursor, &item)
    item_skip(cursor, &item)
    key = item_span(&item)
    if item.kind == TEXT and text_length(key) >= 0:
        # The adapter is named once per block: a salt may be spelled like it.
        if (
            extra.has_lora_name
            and not lora_name_seen[0]
            and key.size == extra.lora_name.size
            and memcmp(key.data, extra.lora_name.data, key.size) == 0
        ):
            lora_name_seen[0] = True
            return True
        if (
            block == 0
            and extra.begins_prompt
            and extra.salt.size == 0
            and not (extra.bare_ids and _is_digest(key))
        ):
            extra.salt = key
            return True
        return _mark(marks, extra, block, _object_hash(key))
    if item.kind == ARRAY and _image(copy, &item):
        return _mark(marks, extra, block, _object_hash(item_span(&item)))
    return _mark(marks, extra, block, XXH3_64bits_withSeed(begin, <size_t>(cursor.at - begin), 0))


cdef inline bint read_extra_keys(Span raw, Stack* marks, Extra* extra) noexcept nogil:
    """Reads a whole `extra_keys` field, one list of keys or nil per block; False: it is misshapen."""
    cdef Cursor cursor = cursor_over(raw)
    cdef Cursor behind
    cdef Item item
    cdef uint64_t block
    cdef uint64_t left
    cdef bint lora_name_seen
    cdef size_t nils = 0
    cdef size_t size
    if item_next(&cursor, &item) != ARRAY or item.value != extra.blocks:
        return False
    if cursor_left(&cursor) == extra.blocks:
        # One byte per block: nearly always nothing beside the tokens.
        while nils < extra.blocks and cursor.at[nils] == 0xC0:
            nils += 1
        if nils == extra.blocks:
            return True
    for block in range(extra.blocks):
        behind = cursor
        skip_values(&behind, 1)
        size = <size_t>(behind.at - cursor.at)
        if item_next(&cursor, &item) == NIL:
            continue
        if item.kind != ARRAY or size > LARGEST_KEYS:
            return False
        lora_name_seen = False
        left = item.value
        while left != 0:
            left -= 1
            if not _read_key(&cursor, marks, extra, block, &lora_name_seen):
                return False
    return text_length(extra.salt) <= LONGEST_NAME


cdef inline int _by_hash(const void* one, const void* other) noexcept nogil:
    cdef uint64_t first = (<const Mark*>one).hash
    cdef uint64_t second = (<const Mark*>other).hash
    return (first > second) - (first < second)


cdef inline int mark_blocks(
    Mark* marks,
    size_t mark_count,
    const uint32_t* tokens,
    uint64_t blocks,
    uint32_t block_size,
    uint64_t seed,
    Stack* scratch,
    uint64_t* out,
) noexcept nogil:
    """Replaces the local hashes of the blocks that show multimodal objects; -1: no memory.

    Args:
        marks: In the order of their blocks, those of one block in any; blocks beyond the last are ignored.
        mark_count: How many.
        tokens: Of all blocks.
        blocks: How many.
        block_size: Tokens of each.
        seed: Of the prompt.
        scratch: Used and left as it was.
        out: Local hashes of all blocks.
    """
    cdef size_t size = block_size * sizeof(uint32_t)
    cdef size_t used = scratch.used
    cdef size_t first = 0
    cdef size_t end
    cdef size_t i
    cdef uint64_t offset = 0
    cdef uint64_t block
    cdef char* data
    while first < mark_count and marks[first].block < blocks:
        block = marks[first].block
        end = first + 1
        while end < mark_count and marks[end].block == block:
            end += 1
        qsort(marks + first, end - first, sizeof(Mark), _by_hash)
        data = <char*>stack_push(scratch, size + (end - first) * sizeof(uint64_t), &offset)
        if data == NULL:
            return -1
        memcpy(data, tokens + block * block_size, size)
        for i in range(first, end):
            memcpy(data + size + (i - first) * sizeof(uint64_t), &marks[i].hash, sizeof(uint64_t))
        out[block] = XXH3_64bits_withSeed(data, scratch.used - offset, seed)
        scratch.used = used
        first = end
    return 0
