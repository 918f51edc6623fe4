"""The fields of an event, each read from its bytes into the event's record.

A reader answers False when its field is misshapen: then the whole event is left out.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from kvrouter_grpc.core.block_hash cimport LARGEST_BLOCK
from kvrouter_grpc.core.extra_keys cimport LONGEST_NAME
from kvrouter_grpc.core.kv_words cimport (
    EVENT_BROKEN,
    KV_BLOCK_SIZE,
    KV_COUNT,
    KV_DEVICE,
    KV_EXTRA,
    KV_GROUP,
    KV_HASHES,
    KV_KINDS,
    KV_LOCALITY,
    KV_LORA_ID,
    KV_LORA_NAME,
    KV_MEDIA,
    KV_MEDIUM,
    KV_PARENT,
    KV_SPEC,
    KV_SPECS,
    KV_TOKENS,
    KV_TYPE,
    KV_WINDOW,
    SPEC_OTHER,
    SPEC_PREFIX,
    kv_step_full_attention,
    kv_step_gpu,
    word_meaning,
)
from kvrouter_grpc.core.msgpack cimport (
    ARRAY,
    BINARY,
    NEGATIVE,
    NIL,
    TEXT,
    UNSIGNED,
    Cursor,
    Item,
    Span,
    __builtin_bswap64,
    big_endian,
    cursor_left,
    item_next,
    item_span,
    skip_values,
    text_length,
)
from kvrouter_grpc.core.stack cimport Stack, stack_push
from kvrouter_grpc.core.target cimport MOST_GROUPS


cdef extern from "kv_tokens.h" nogil:
    size_t kv_fours(const uint8_t** cursor, const uint8_t* end, uint32_t* out, size_t count)


cdef enum:
    MOST_NAMES = 1 << 20  # blocks of one event
    GROUPS = MOST_GROUPS


cdef struct Event:
    uint64_t parent
    uint64_t seed
    uint64_t names  # where its engine hashes begin in Batch.names
    uint64_t tokens  # where its tokens begin in Batch.tokens: `block_size` for each name, or none
    uint64_t marks  # where its multimodal objects begin in Batch.marks
    Span raw
    uint32_t count  # names
    uint32_t mark_count
    uint32_t block_size
    uint32_t window  # tokens; 0: not told
    uint8_t kind
    uint8_t tier
    uint8_t group
    uint8_t spec
    bint has_parent
    bint has_tokens
    bint postponed  # see KvFeed


# The records of one message and what they point to. The memory is used again for the next.
cdef struct Batch:
    Stack events  # Event
    Stack names  # uint64_t
    Stack tokens  # uint32_t
    Stack marks  # Mark
    Stack seqs  # uint64_t: work space of the event being applied
    Stack bytes  # the same
    bint full  # there was no memory for more


# What an event says beside its record, until it is complete.
cdef struct Told:
    uint64_t token_count
    uint64_t lora_id
    Span lora_name
    Span extra
    int tier
    bint remote
    bint has_hashes
    bint has_lora_id
    bint lora_id_is_negative
    bint has_lora_name
    bint has_group


cdef inline bint _hash_of(const Item* item, uint64_t* name) noexcept nogil:
    # The 64 bits by which a block is known: an integer's bit pattern, the end of a digest. vLLM's integer hashes are
    # the low 64 bits of the digests it sends in bytes mode, so both forms are equal.
    if item.kind == UNSIGNED or item.kind == NEGATIVE:
        name[0] = item.value
        return True
    if item.kind == BINARY and item.value >= 8:
        name[0] = big_endian(item.data + item.value - 8, 8)
        return True
    return False


cdef inline bint read_hashes(Cursor* cursor, Batch* batch, Event* event, Told* told) noexcept nogil:
    cdef Item item
    cdef uint64_t* names
    cdef uint64_t i
    told.has_hashes = True
    if item_next(cursor, &item) != ARRAY or item.value > MOST_NAMES or item.value > cursor_left(cursor):
        return False
    event.count = <uint32_t>item.value
    names = <uint64_t*>stack_push(&batch.names, event.count * sizeof(uint64_t), &event.names)
    if names == NULL:
        batch.full = True
        return False
    for i in range(event.count):
        if cursor_left(cursor) >= 9 and cursor.at[0] == 0xCF:  # nearly every hash is a number of 8 bytes
            names[i] = big_endian(cursor.at + 1, 8)
            cursor.at += 9
            continue
        item_next(cursor, &item)
        if not _hash_of(&item, names + i):
            return False
    return True


cdef inline bint read_tokens(Cursor* cursor, Batch* batch, Event* event, Told* told) noexcept nogil:
    cdef Item item
    cdef uint32_t* tokens
    cdef uint64_t left
    cdef uint64_t fours
    cdef uint64_t sure
    cdef uint64_t word
    cdef uint64_t i
    cdef uint32_t far
    cdef uint32_t more
    cdef const uint8_t* at
    told.token_count = 0
    if item_next(cursor, &item) == NIL:
        return True
    if item.kind != ARRAY or item.value > cursor_left(cursor):
        return False
    told.token_count = left = item.value
    tokens = <uint32_t*>stack_push(&batch.tokens, left * sizeof(uint32_t), &event.tokens)
    if tokens == NULL:
        batch.full = True
        return False
    at = cursor.at
    while left != 0:
        fours = kv_fours(&at, cursor.end, tokens, left)
        tokens += fours
        left -= fours
        sure = <uint64_t>(cursor.end - at) >> 3  # tokens that surely have 8 bytes to be read from
        if sure > left:
            sure = left
        for i in range(sure):
            # The size of a number is as good as random: taking it from the bits of its first byte saves the processor a
            # guess per token. A number below 128 is its first byte, others lie in the 1, 2 or 4 bytes behind theirs.
            if at[0] >= 0x80 and not 0xCC <= at[0] <= 0xCE:
                break
            memcpy(&word, at, 8)
            far = at[0] >> 7
            more = far << (at[0] & 3)
            tokens[0] = <uint32_t>((__builtin_bswap64(word) << (8 * far)) >> (56 - 8 * (more - far)))
            at += 1 + more
            tokens += 1
            left -= 1
        if left != 0:
            cursor.at = at
            if item_next(cursor, &item) != UNSIGNED or item.value >> 32:
                return False
            tokens[0] = <uint32_t>item.value
            at = cursor.at
            tokens += 1
            left -= 1
    cursor.at = at
    return True


cdef inline bint read_parent(Cursor* cursor, Event* event) noexcept nogil:
    cdef Item item
    event.has_parent = item_next(cursor, &item) != NIL
    return not event.has_parent or _hash_of(&item, &event.parent)


cdef inline bint _read_number(Cursor* cursor, uint64_t largest, Item* item) noexcept nogil:
    # A natural number or nil.
    item_next(cursor, item)
    return item.kind == NIL or (item.kind == UNSIGNED and item.value <= largest)


cdef inline bint read_block_size(Cursor* cursor, Event* event) noexcept nogil:
    cdef Item item
    if not _read_number(cursor, LARGEST_BLOCK, &item):
        return False
    event.block_size = 0 if item.kind == NIL else <uint32_t>item.value
    return True


cdef inline bint read_group(Cursor* cursor, Event* event, Told* told) noexcept nogil:
    cdef Item item
    if not _read_number(cursor, GROUPS - 1, &item):
        return False
    told.has_group = item.kind != NIL
    event.group = 0 if item.kind == NIL else <uint8_t>item.value
    return True


cdef inline bint _read_integer(Cursor* cursor, Item* item) noexcept nogil:
    item_next(cursor, item)
    return item.kind == NIL or item.kind == UNSIGNED or item.kind == NEGATIVE


cdef inline bint read_lora_id(Cursor* cursor, Told* told) noexcept nogil:
    cdef Item item
    if not _read_integer(cursor, &item):
        return False
    told.has_lora_id = item.kind != NIL
    told.lora_id_is_negative = item.kind == NEGATIVE
    told.lora_id = item.value
    return True


cdef inline bint _read_text(Cursor* cursor, Item* item) noexcept nogil:
    # A text or nil; nil is given as "".
    item_next(cursor, item)
    if item.kind == NIL:
        item.value = 0
        item.data = cursor.at
        return True
    return item.kind == TEXT


cdef inline bint read_medium(Cursor* cursor, Told* told) noexcept nogil:
    cdef Item item
    cdef uint8_t upper[16]
    cdef Span medium
    cdef size_t i
    told.tier = KV_DEVICE
    if kv_step_gpu(&cursor.at, cursor.end):
        return True
    if not _read_text(cursor, &item) or item.value > sizeof(upper):
        return False
    if item.kind == NIL:
        return True
    for i in range(item.value):
        upper[i] = item.data[i] - 32 if 0x61 <= item.data[i] <= 0x7A else item.data[i]
    medium.data = upper
    medium.size = item.value
    told.tier = word_meaning(KV_MEDIA, KV_COUNT(KV_MEDIA), medium, -1)
    return told.tier >= 0


cdef inline bint read_locality(Cursor* cursor, Told* told) noexcept nogil:
    cdef Item item
    if not _read_text(cursor, &item):
        return False
    told.remote = item.value == 6 and memcmp(item.data, b"REMOTE", 6) == 0
    return item.kind == NIL or told.remote or (item.value == 5 and memcmp(item.data, b"LOCAL", 5) == 0)


cdef inline bint read_spec(Cursor* cursor, Event* event) noexcept nogil:
    cdef Item item
    if kv_step_full_attention(&cursor.at, cursor.end):
        event.spec = SPEC_PREFIX
        return True
    if not _read_text(cursor, &item):
        return False
    event.spec = <uint8_t>word_meaning(KV_SPECS, KV_COUNT(KV_SPECS), item_span(&item), SPEC_OTHER)
    return event.spec != SPEC_OTHER or text_length(item_span(&item)) >= 0


cdef inline bint read_window(Cursor* cursor, Event* event) noexcept nogil:
    # A window that is no window, or of no use in 32 bits, is not told.
    cdef Item item
    if not _read_integer(cursor, &item):
        return False
    event.window = <uint32_t>item.value if item.kind == UNSIGNED and not item.value >> 32 else 0
    return True


cdef inline bint read_lora_name(Cursor* cursor, Told* told) noexcept nogil:
    cdef Item item
    if not _read_text(cursor, &item):
        return False
    told.has_lora_name = item.kind == TEXT
    told.lora_name = item_span(&item)
    return 0 <= text_length(told.lora_name) <= LONGEST_NAME


cdef inline bint read_extra(Cursor* cursor, Told* told) noexcept nogil:
    # Only its place: it is taken apart when the event is complete.
    told.extra.data = cursor.at
    skip_values(cursor, 1)
    told.extra.size = <size_t>(cursor.at - told.extra.data)
    return True


cdef inline bint _read_type(Cursor* cursor, Event* event) noexcept nogil:
    # A second time: it has to say the same.
    cdef Item item
    item_next(cursor, &item)
    return (
        item.kind == TEXT and word_meaning(KV_KINDS, KV_COUNT(KV_KINDS), item_span(&item), EVENT_BROKEN) == event.kind
    )


cdef inline bint read_field(Cursor* cursor, Batch* batch, Event* event, Told* told, int field) noexcept nogil:
    """Reads the value of one field; False: it is misshapen."""
    if field == KV_HASHES:
        return read_hashes(cursor, batch, event, told)
    elif field == KV_PARENT:
        return read_parent(cursor, event)
    elif field == KV_TOKENS:
        return read_tokens(cursor, batch, event, told)
    elif field == KV_BLOCK_SIZE:
        return read_block_size(cursor, event)
    elif field == KV_LORA_ID:
        return read_lora_id(cursor, told)
    elif field == KV_MEDIUM:
        return read_medium(cursor, told)
    elif field == KV_LORA_NAME:
        return read_lora_name(cursor, told)
    elif field == KV_EXTRA:
        return read_extra(cursor, told)
    elif field == KV_GROUP:
        return read_group(cursor, event, told)
    elif field == KV_SPEC:
        return read_spec(cursor, event)
    elif field == KV_WINDOW:
        return read_window(cursor, event)
    elif field == KV_LOCALITY:
        return read_locality(cursor, told)
    elif field == KV_TYPE:
        return _read_type(cursor, event)
    skip_values(cursor, 1)
    return True
