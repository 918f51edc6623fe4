/* The words of vLLM's KV events.
 *
 * vLLM has published two generations of events: up to 0.23 an event is an array whose first element names its kind,
 * since 0.24 a map with a `type` key. Fields were only ever appended, so one order covers every release:
 *
 *   BlockStored   block_hashes, parent_block_hash, token_ids, block_size, lora_id | medium (0.10.2)
 *                 | lora_name (0.14) | extra_keys (0.17) | group_idx (0.20)
 *                 | kv_cache_spec_kind, kv_cache_spec_sliding_window (0.22) | locality (0.26)
 *   BlockRemoved  block_hashes | medium (0.10.2) | group_idx (0.20) | locality (0.26)
 */
#ifndef KVROUTER_KV_WORDS_H
#define KVROUTER_KV_WORDS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    const char *text;
    size_t size;
    int meaning;
} kv_word;

#define KV_WORD(text, meaning) {text, sizeof(text) - 1, meaning}
#define KV_COUNT(words) (sizeof(words) / sizeof(kv_word))

enum { EVENT_BROKEN, EVENT_STORED, EVENT_REMOVED, EVENT_CLEARED };

static const kv_word KV_KINDS[] = {
    KV_WORD("BlockStored", EVENT_STORED),
    KV_WORD("BlockRemoved", EVENT_REMOVED),
    KV_WORD("AllBlocksCleared", EVENT_CLEARED),
};

enum {
    KV_TYPE, KV_HASHES, KV_PARENT, KV_TOKENS, KV_BLOCK_SIZE, KV_LORA_ID, KV_MEDIUM, KV_LORA_NAME, KV_EXTRA, KV_GROUP,
    KV_SPEC, KV_WINDOW, KV_LOCALITY, KV_UNKNOWN
};

/* In the order of the array form, the kind in front. */
static const kv_word KV_STORED_FIELDS[] = {
    KV_WORD("type", KV_TYPE),
    KV_WORD("block_hashes", KV_HASHES),
    KV_WORD("parent_block_hash", KV_PARENT),
    KV_WORD("token_ids", KV_TOKENS),
    KV_WORD("block_size", KV_BLOCK_SIZE),
    KV_WORD("lora_id", KV_LORA_ID),
    KV_WORD("medium", KV_MEDIUM),
    KV_WORD("lora_name", KV_LORA_NAME),
    KV_WORD("extra_keys", KV_EXTRA),
    KV_WORD("group_idx", KV_GROUP),
    KV_WORD("kv_cache_spec_kind", KV_SPEC),
    KV_WORD("kv_cache_spec_sliding_window", KV_WINDOW),
    KV_WORD("locality", KV_LOCALITY),
};

static const kv_word KV_REMOVED_FIELDS[] = {
    KV_WORD("type", KV_TYPE),
    KV_WORD("block_hashes", KV_HASHES),
    KV_WORD("medium", KV_MEDIUM),
    KV_WORD("group_idx", KV_GROUP),
    KV_WORD("locality", KV_LOCALITY),
};

static const kv_word KV_CLEARED_FIELDS[] = {KV_WORD("type", KV_TYPE)};

/* Nearest first, as in `Tier`. A medium that is not here is no tier: claiming one would promise hits. */
enum { KV_DEVICE, KV_HOST, KV_DISK, KV_REMOTE, KV_TIERS };

static const kv_word KV_MEDIA[] = {
    KV_WORD("GPU", KV_DEVICE),       KV_WORD("DEVICE", KV_DEVICE),  KV_WORD("CPU", KV_HOST),
    KV_WORD("CPU_PINNED", KV_HOST),  KV_WORD("CPU_TIER1", KV_HOST), KV_WORD("CPU_TIER2", KV_DISK),
    KV_WORD("DISK", KV_DISK),        KV_WORD("NVME", KV_DISK),      KV_WORD("STORAGE", KV_DISK),
    KV_WORD("FS", KV_DISK),          KV_WORD("OBJ", KV_REMOTE),     KV_WORD("EXTERNAL", KV_REMOTE),
    KV_WORD("NETWORK", KV_REMOTE),   KV_WORD("REMOTE", KV_REMOTE),  KV_WORD("SHARED", KV_REMOTE),
};

/* What a KV cache group needs of a prefix: all of it, the window or the state at its end, or nothing, for its blocks are
 * never shared. What else there is (chunked local attention) does not tell enough to be judged. */
enum { SPEC_UNTOLD, SPEC_PREFIX, SPEC_WINDOW, SPEC_STATE, SPEC_NOTHING, SPEC_OTHER };

static const kv_word KV_SPECS[] = {
    KV_WORD("", SPEC_UNTOLD),
    KV_WORD("full_attention", SPEC_PREFIX),
    KV_WORD("mla_attention", SPEC_PREFIX),
    KV_WORD("sink_full_attention", SPEC_PREFIX),
    KV_WORD("sliding_window", SPEC_WINDOW),
    KV_WORD("sliding_window_mla", SPEC_WINDOW),
    KV_WORD("mamba", SPEC_STATE),
    KV_WORD("encoder_only_attention", SPEC_NOTHING),
    KV_WORD("cross_attention", SPEC_NOTHING),
};

/* Each steps over one MessagePack text, head included, if it is what comes next. The lengths are known to the compiler,
 * so a step is a comparison or two, where reading a text and looking it up costs tens of instructions. */
#define KV_STEP(name, text)                                                                                       \
    static inline int name(const uint8_t **at, const uint8_t *end) {                                              \
        if ((size_t)(end - *at) < sizeof(text) - 1 || memcmp(*at, text, sizeof(text) - 1) != 0) return 0;         \
        *at += sizeof(text) - 1;                                                                                  \
        return 1;                                                                                                 \
    }

KV_STEP(kv_step_nil, "\xc0")
KV_STEP(kv_step_type, "\xa4" "type")
KV_STEP(kv_step_stored, "\xab" "BlockStored")
KV_STEP(kv_step_removed, "\xac" "BlockRemoved")
KV_STEP(kv_step_hashes, "\xac" "block_hashes")
KV_STEP(kv_step_parent, "\xb1" "parent_block_hash")
KV_STEP(kv_step_tokens, "\xa9" "token_ids")
KV_STEP(kv_step_block_size, "\xaa" "block_size")
KV_STEP(kv_step_lora_id, "\xa7" "lora_id")
KV_STEP(kv_step_medium, "\xa6" "medium")
KV_STEP(kv_step_lora_name, "\xa9" "lora_name")
KV_STEP(kv_step_extra, "\xaa" "extra_keys")
KV_STEP(kv_step_group, "\xa9" "group_idx")
KV_STEP(kv_step_spec, "\xb2" "kv_cache_spec_kind")
KV_STEP(kv_step_gpu, "\xa3" "GPU")
KV_STEP(kv_step_full_attention, "\xae" "full_attention")

#endif
