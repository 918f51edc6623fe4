"""Reads the events of a vLLM batch into flat records, without a Python object.

vLLM has published two generations of events: up to 0.23 an event is an array whose first element names its kind, since
0.24 a map with a `type` key. Fields were only ever appended, so one positional layout covers every release:

    BlockStored   block_hashes, parent_block_hash, token_ids, block_size, lora_id | medium (0.10.2) | lora_name (0.14)
                  | extra_keys (0.17) | group_idx (0.20) | kv_cache_spec_kind, kv_cache_spec_sliding_window (0.22)
                  | locality (0.26)
    BlockRemoved  block_hashes | medium (0.10.2) | group_idx (0.20) | locality (0.26)

A reader answers False when its field is misshapen: then the event is left out. What is newer than this is skipped.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from kvrouter_grpc.core.block_hash cimport BASE_SEED, LARGEST_BLOCK, XXH3_64bits_withSeed
from kvrouter_grpc.core.extra_keys cimport LONGEST_NAME, Extra, read_extra_keys
from kvrouter_grpc.core.msgpack cimport (
    ARRAY,
    BINARY,
    MAP,
    NEGATIVE,
    NIL,
    TEXT,
    UNSIGNED,
    Cursor,
    Item,
    Kind,
    Span,
    __builtin_bswap64,
    big_endian,
    cursor_left,
    cursor_over,
    item_next,
    item_skip,
    item_span,
    skip_values,
    text_length,
)
from kvrouter_grpc.core.stack cimport Stack, stack_push


cdef extern from *:
    """
    enum { KV_HASHES, KV_PARENT, KV_TOKENS, KV_BLOCK_SIZE, KV_LORA_ID, KV_MEDIUM, KV_LORA_NAME, KV_EXTRA, KV_GROUP,
           KV_SPEC, KV_WINDOW, KV_LOCALITY, KV_TYPE, KV_UNKNOWN };

    typedef struct { const char *text; size_t size; int meaning; } kv_word;
    #define KV_WORD(text, meaning) {text, sizeof(text) - 1, meaning}
    #define KV_COUNT(words) (sizeof(words) / sizeof(kv_word))

    /* The order is that of the positional form, with the kind in front. */
    static const kv_word KV_STORED_FIELDS[] = {
        KV_WORD("type", KV_TYPE), KV_WORD("block_hashes", KV_HASHES), KV_WORD("parent_block_hash", KV_PARENT),
        KV_WORD("token_ids", KV_TOKENS), KV_WORD("block_size", KV_BLOCK_SIZE), KV_WORD("lora_id", KV_LORA_ID),
        KV_WORD("medium", KV_MEDIUM), KV_WORD("lora_name", KV_LORA_NAME), KV_WORD("extra_keys", KV_EXTRA),
        KV_WORD("group_idx", KV_GROUP), KV_WORD("kv_cache_spec_kind", KV_SPEC),
        KV_WORD("kv_cache_spec_sliding_window", KV_WINDOW), KV_WORD("locality", KV_LOCALITY),
    };
    static const kv_word KV_REMOVED_FIELDS[] = {
        KV_WORD("type", KV_TYPE), KV_WORD("block_hashes", KV_HASHES), KV_WORD("medium", KV_MEDIUM),
        KV_WORD("group_idx", KV_GROUP), KV_WORD("locality", KV_LOCALITY),
    };
    static const kv_word KV_CLEARED_FIELDS[] = {KV_WORD("type", KV_TYPE)};
    """
    enum:
        KV_HASHES
        KV_PARENT
        KV_TOKENS
        KV_BLOCK_SIZE
        KV_LORA_ID
        KV_MEDIUM
        KV_LORA_NAME
        KV_EXTRA
        KV_GROUP
        KV_SPEC
        KV_WINDOW
        KV_LOCALITY
        KV_TYPE
        KV_UNKNOWN
    ctypedef struct kv_word:
        const char* text
        size_t size
        int meaning
    size_t KV_COUNT(const kv_word* words) nogil
    const kv_word KV_STORED_FIELDS[]
    const kv_word KV_REMOVED_FIELDS[]
    const kv_word KV_CLEARED_FIELDS[]


cdef extern from *:
    """
    /* Nearest first, as in `Tier`. What is not here is no tier: claiming one would promise hits. */
    enum { KV_DEVICE, KV_HOST, KV_DISK, KV_REMOTE, KV_TIERS };
    static const kv_word KV_MEDIA[] = {
        KV_WORD("GPU", KV_DEVICE), KV_WORD("DEVICE", KV_DEVICE),
        KV_WORD("CPU", KV_HOST), KV_WORD("CPU_PINNED", KV_HOST), KV_WORD("CPU_TIER1", KV_HOST),
        KV_WORD("CPU_TIER2", KV_DISK), KV_WORD("DISK", KV_DISK), KV_WORD("NVME", KV_DISK),
        KV_WORD("STORAGE", KV_DISK), KV_WORD("FS", KV_DISK),
        KV_WORD("OBJ", KV_REMOTE), KV_WORD("EXTERNAL", KV_REMOTE), KV_WORD("NETWORK", KV_REMOTE),
        KV_WORD("REMOTE", KV_REMOTE), KV_WORD("SHARED", KV_REMOTE),
    };

    enum { EVENT_BROKEN, EVENT_STORED, EVENT_REMOVED, EVENT_CLEARED };
    static const kv_word KV_KINDS[] = {
        KV_WORD("BlockStored", EVENT_STORED), KV_WORD("BlockRemoved", EVENT_REMOVED),
        KV_WORD("AllBlocksCleared", EVENT_CLEARED),
    };

    /* Groups whose blocks serve any later prompt with the same prefix. Sliding-window and state-space groups keep only
       their end, so their blocks say nothing about the prefix. */
    enum { SPEC_UNTOLD, SPEC_PREFIX, SPEC_OTHER };
    static const kv_word KV_SPECS[] = {
        KV_WORD("", SPEC_UNTOLD), KV_WORD("full_attention", SPEC_PREFIX), KV_WORD("mla_attention", SPEC_PREFIX),
        KV_WORD("sink_full_attention", SPEC_PREFIX),
    };
    """
    enum:
        KV_DEVICE
        KV_REMOTE
        KV_TIERS
        EVENT_BROKEN
        EVENT_STORED
        EVENT_REMOVED
        EVENT_CLEARED
        SPEC_UNTOLD
        SPEC_PREFIX
        SPEC_OTHER
    const kv_word KV_MEDIA[]
    const kv_word KV_KINDS[]
    const kv_word KV_SPECS[]


cdef extern from "<stdio.h>" nogil:
    int snprintf(char* out, size_t size, const char* format, ...)


cdef enum:
    MOST_NAMES = 1 << 20  # blocks of one event
    GROUPS = 64  # KV cache groups; models have fewer than ten


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
    uint8_t kind
    uint8_t tier
    uint8_t group
    uint8_t spec
    bint has_parent
    bint has_tokens


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
    bint has_hashes
    bint has_lora_id
    bint lora_id_is_negative
    bint has_lora_name
    bint has_group


cdef inline int _meaning(const kv_word* words, size_t count, Span text, int otherwise) noexcept nogil:
    cdef size_t i
    for i in range(count):
        if words[i].size == text.size and memcmp(words[i].text, text.data, text.size) == 0:
            return words[i].meaning
    return otherwise


# --- fields ------------------------------------------------------------------------------------------------------


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


cdef inline bint _read_hashes(Cursor* cursor, Batch* batch, Event* event) noexcept nogil:
    cdef Item item
    cdef uint64_t* names
    cdef uint64_t i
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


cdef inline bint _read_tokens(Cursor* cursor, Batch* batch, Event* event, Told* told) noexcept nogil:
    cdef Item item
    cdef uint32_t* tokens
    cdef uint64_t left
    cdef uint64_t word
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
        if cursor.end - at >= 8 and (at[0] < 0x80 or 0xCC <= at[0] <= 0xCE):
            # The size of a number is as good as random: taking it from the bits of its first byte saves the processor
            # a guess per token. A small number is its first byte, others lie in the 1, 2 or 4 bytes behind theirs.
            memcpy(&word, at, 8)
            more = (at[0] >> 7) << (at[0] & 3)
            tokens[0] = at[0] if more == 0 else <uint32_t>((__builtin_bswap64(word) << 8) >> (64 - 8 * more))
            at += 1 + more
        else:
            cursor.at = at
            if item_next(cursor, &item) != UNSIGNED or item.value >> 32:
                return False
            tokens[0] = <uint32_t>item.value
            at = cursor.at
        tokens += 1
        left -= 1
    cursor.at = at
    return True


cdef inline bint _read_parent(Cursor* cursor, Event* event) noexcept nogil:
    cdef Item item
    event.has_parent = item_next(cursor, &item) != NIL
    return not event.has_parent or _hash_of(&item, &event.parent)


cdef inline bint _read_number(Cursor* cursor, uint64_t largest, Item* item) noexcept nogil:
    # A natural number or nil.
    item_next(cursor, item)
    return item.kind == NIL or (item.kind == UNSIGNED and item.value <= largest)


cdef inline bint _read_text(Cursor* cursor, Item* item) noexcept nogil:
    # A text or nil; nil is given as "".
    item_next(cursor, item)
    if item.kind == NIL:
        item.value = 0
        item.data = cursor.at
        return True
    return item.kind == TEXT


cdef inline bint _read_integer(Cursor* cursor, Item* item) noexcept nogil:
    item_next(cursor, item)
    return item.kind == NIL or item.kind == UNSIGNED or item.kind == NEGATIVE


cdef inline bint _read_medium(Cursor* cursor, int* tier) noexcept nogil:
    cdef Item item
    cdef uint8_t upper[16]
    cdef Span medium
    cdef size_t i
    if not _read_text(cursor, &item) or item.value > sizeof(upper):
        return False
    if item.kind == NIL:
        tier[0] = KV_DEVICE
        return True
    for i in range(item.value):
        upper[i] = item.data[i] - 32 if 0x61 <= item.data[i] <= 0x7A else item.data[i]
    medium.data = upper
    medium.size = item.value
    tier[0] = _meaning(KV_MEDIA, KV_COUNT(KV_MEDIA), medium, -1)
    return tier[0] >= 0


cdef inline bint _read_locality(Cursor* cursor, bint* remote) noexcept nogil:
    cdef Item item
    if not _read_text(cursor, &item):
        return False
    remote[0] = item.value == 6 and memcmp(item.data, b"REMOTE", 6) == 0
    return item.kind == NIL or remote[0] or (item.value == 5 and memcmp(item.data, b"LOCAL", 5) == 0)


cdef inline bint _read_spec(Cursor* cursor, Event* event) noexcept nogil:
    cdef Item item
    if not _read_text(cursor, &item) or text_length(item_span(&item)) < 0:
        return False
    event.spec = <uint8_t>_meaning(KV_SPECS, KV_COUNT(KV_SPECS), item_span(&item), SPEC_OTHER)
    return True


cdef inline bint _read_lora_name(Cursor* cursor, Told* told) noexcept nogil:
    cdef Item item
    cdef int64_t length
    if not _read_text(cursor, &item):
        return False
    told.has_lora_name = item.kind == TEXT
    told.lora_name = item_span(&item)
    length = text_length(told.lora_name)
    return 0 <= length <= LONGEST_NAME


cdef inline bint _read_raw(Cursor* cursor, Span* span) noexcept nogil:
    span.data = cursor.at
    skip_values(cursor, 1)
    span.size = <size_t>(cursor.at - span.data)
    return True


# --- events ------------------------------------------------------------------------------------------------------


cdef inline bint _read_field(
    Cursor* cursor, Batch* batch, Event* event, Told* told, int field, int* tier, bint* remote
) noexcept nogil:
    cdef Item item
    if field == KV_HASHES:
        told.has_hashes = True
        return _read_hashes(cursor, batch, event)
    if field == KV_PARENT:
        return _read_parent(cursor, event)
    if field == KV_TOKENS:
        return _read_tokens(cursor, batch, event, told)
    if field == KV_BLOCK_SIZE:
        if not _read_number(cursor, LARGEST_BLOCK, &item):
            return False
        event.block_size = 0 if item.kind == NIL else <uint32_t>item.value
        return True
    if field == KV_LORA_ID:
        if not _read_integer(cursor, &item):
            return False
        told.has_lora_id = item.kind != NIL
        told.lora_id_is_negative = item.kind == NEGATIVE
        told.lora_id = item.value
        return True
    if field == KV_MEDIUM:
        return _read_medium(cursor, tier)
    if field == KV_LORA_NAME:
        return _read_lora_name(cursor, told)
    if field == KV_EXTRA:
        return _read_raw(cursor, &told.extra)
    if field == KV_GROUP:
        if not _read_number(cursor, GROUPS - 1, &item):
            return False
        told.has_group = item.kind != NIL
        event.group = 0 if item.kind == NIL else <uint8_t>item.value
        return True
    if field == KV_SPEC:
        return _read_spec(cursor, event)
    if field == KV_WINDOW:
        return _read_integer(cursor, &item)
    if field == KV_LOCALITY:
        return _read_locality(cursor, remote)
    if field == KV_TYPE:
        item_next(cursor, &item)
        return (
            item.kind == TEXT
            and _meaning(KV_KINDS, KV_COUNT(KV_KINDS), item_span(&item), EVENT_BROKEN) == event.kind
        )
    skip_values(cursor, 1)
    return True


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


cdef inline bint _read_tag(Cursor* cursor, Event* event) noexcept nogil:
    cdef Item item
    if item_next(cursor, &item) != TEXT:
        return False
    event.kind = <uint8_t>_meaning(KV_KINDS, KV_COUNT(KV_KINDS), item_span(&item), EVENT_BROKEN)
    return event.kind != EVENT_BROKEN


cdef inline bint _find_tag(Cursor* cursor, uint64_t pairs, Event* event) noexcept nogil:
    # The kind usually comes first; wherever it is, it says how the rest is to be read.
    cdef Item key
    while pairs != 0 and not cursor.broken:
        if item_next(cursor, &key) != TEXT:
            return False
        if key.value == 4 and memcmp(key.data, b"type", 4) == 0:
            return _read_tag(cursor, event)
        skip_values(cursor, 1)
        pairs -= 1
    return False


cdef inline int _field(const kv_word* words, size_t count, size_t* expected, Span key) noexcept nogil:
    # Fields come in the order of their layout, some left out: so the search begins behind the last one found.
    cdef size_t at = expected[0]
    cdef size_t i
    for i in range(count):
        if at == count:
            at = 0
        if words[at].size == key.size and memcmp(words[at].text, key.data, key.size) == 0:
            expected[0] = at + 1
            return words[at].meaning
        at += 1
    return KV_UNKNOWN


cdef inline bint _read_event(Cursor* cursor, Batch* batch, Event* event) noexcept nogil:
    cdef Told told
    cdef Item item
    cdef Item key
    cdef const kv_word* words
    cdef size_t count
    cdef size_t expected = 1
    cdef uint64_t left
    cdef int field
    cdef int tier = KV_DEVICE
    cdef bint remote = False
    cdef bint named
    cdef const uint8_t* body
    memset(event, 0, sizeof(Event))
    memset(&told, 0, sizeof(Told))
    item_next(cursor, &item)
    if (item.kind != ARRAY and item.kind != MAP) or item.value == 0:
        return False
    named = item.kind == MAP
    body = cursor.at
    if not (_find_tag(cursor, item.value, event) if named else _read_tag(cursor, event)):
        return False
    if event.kind == EVENT_STORED:
        words = KV_STORED_FIELDS
        count = KV_COUNT(KV_STORED_FIELDS)
    elif event.kind == EVENT_REMOVED:
        words = KV_REMOVED_FIELDS
        count = KV_COUNT(KV_REMOVED_FIELDS)
    else:
        words = KV_CLEARED_FIELDS
        count = KV_COUNT(KV_CLEARED_FIELDS)
    if named:
        cursor.at = body
        expected = 0
    left = item.value if named else item.value - 1
    while left != 0:
        left -= 1
        if named:
            if item_next(cursor, &key) != TEXT:
                return False
            field = _field(words, count, &expected, item_span(&key))
        else:
            field = words[expected].meaning if expected < count else KV_UNKNOWN
            expected += 1
        if not _read_field(cursor, batch, event, &told, field, &tier, &remote) or cursor.broken:
            return False
    event.tier = <uint8_t>(KV_REMOTE if remote else tier)
    if event.kind == EVENT_CLEARED:
        return True
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
