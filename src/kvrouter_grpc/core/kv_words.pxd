"""The words of vLLM's KV events; `kv_words.h` has the tables and says where they come from."""

from libc.stdint cimport uint8_t
from libc.string cimport memcmp

from kvrouter_grpc.core.msgpack cimport Span


cdef extern from "kv_words.h" nogil:
    ctypedef struct kv_word:
        const char* text
        size_t size
        int meaning

    enum:
        EVENT_BROKEN
        EVENT_STORED
        EVENT_REMOVED
        EVENT_CLEARED
        KV_TYPE
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
        KV_UNKNOWN
        KV_DEVICE
        KV_REMOTE
        KV_TIERS
        SPEC_UNTOLD
        SPEC_PREFIX
        SPEC_WINDOW
        SPEC_STATE
        SPEC_NOTHING
        SPEC_OTHER

    const kv_word KV_KINDS[]
    const kv_word KV_STORED_FIELDS[]
    const kv_word KV_REMOVED_FIELDS[]
    const kv_word KV_CLEARED_FIELDS[]
    const kv_word KV_MEDIA[]
    const kv_word KV_SPECS[]
    size_t KV_COUNT(const kv_word* words)

    bint kv_step_nil(const uint8_t** at, const uint8_t* end)
    bint kv_step_type(const uint8_t** at, const uint8_t* end)
    bint kv_step_stored(const uint8_t** at, const uint8_t* end)
    bint kv_step_removed(const uint8_t** at, const uint8_t* end)
    bint kv_step_hashes(const uint8_t** at, const uint8_t* end)
    bint kv_step_parent(const uint8_t** at, const uint8_t* end)
    bint kv_step_tokens(const uint8_t** at, const uint8_t* end)
    bint kv_step_block_size(const uint8_t** at, const uint8_t* end)
    bint kv_step_lora_id(const uint8_t** at, const uint8_t* end)
    bint kv_step_medium(const uint8_t** at, const uint8_t* end)
    bint kv_step_lora_name(const uint8_t** at, const uint8_t* end)
    bint kv_step_extra(const uint8_t** at, const uint8_t* end)
    bint kv_step_group(const uint8_t** at, const uint8_t* end)
    bint kv_step_spec(const uint8_t** at, const uint8_t* end)
    bint kv_step_gpu(const uint8_t** at, const uint8_t* end)
    bint kv_step_full_attention(const uint8_t** at, const uint8_t* end)


cdef inline int word_meaning(const kv_word* words, size_t count, Span text, int otherwise) noexcept nogil:
    cdef size_t i
    for i in range(count):
        if words[i].size == text.size and memcmp(words[i].text, text.data, text.size) == 0:
            return words[i].meaning
    return otherwise
