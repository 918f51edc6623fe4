"""Storing what one event tells into the lane that it is about: its blocks by their tokens, or by their names alone."""

from libc.stdint cimport uint32_t, uint64_t

from kvrouter_grpc.core.block_hash cimport chain_hashes, local_hashes, sequence_run
from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.extra_keys cimport Mark, mark_blocks
from kvrouter_grpc.core.kv_fields cimport MOST_NAMES, Batch, Event
from kvrouter_grpc.core.kv_words cimport KV_TIERS
from kvrouter_grpc.core.lanes cimport Lanes, lanes_find, lanes_slot
from kvrouter_grpc.core.slot cimport slot_store
from kvrouter_grpc.core.stack cimport stack_push
from kvrouter_grpc.core.tree cimport DEEPEST, Tree, edge_depth
from kvrouter_grpc.core.wide cimport wide_names, wide_store


ctypedef enum Stored:
    STORED
    ORPHANED  # nobody knows the parent
    NO_ROOM  # in memory or in the index


cdef inline uint32_t event_lane(const Event* event) noexcept nogil:
    return event.group * KV_TIERS + event.tier


cdef inline uint64_t* event_names(const Event* event, const Batch* batch) noexcept nogil:
    return <uint64_t*>(batch.names.data + event.names)


cdef inline Stored store_tokens(
    const Lanes* lanes, Tree* tree, size_t block_size, const Event* event, Batch* batch
) noexcept nogil:
    """Stores the blocks of an event that tells their tokens; its lane has a slot.

    Args:
        lanes: Of the engine.
        tree: The index.
        block_size: Of the tree.
        event: What is stored.
        batch: The message it came in, whose work space is used.
    """
    cdef uint32_t lane = event_lane(event)
    cdef uint32_t width = lanes.groups[event.group].width
    cdef uint32_t count = event.count * width
    cdef uint64_t seed = event.seed
    cdef const uint64_t* parent_seq = NULL
    cdef const uint32_t* tokens = <uint32_t*>(batch.tokens.data + event.tokens)
    cdef uint64_t* names = event_names(event, batch)
    cdef uint64_t* seqs
    cdef uint64_t offset = 0
    cdef uint32_t block = 0
    cdef Edge* edge = NULL
    if event.has_parent:
        edge = lanes_find(lanes, tree, lane, event.parent, &block)
        if edge == NULL:
            return ORPHANED
        parent_seq = &edge.run.hashes[edge.start + block]
        seed = edge.run.seed
        block += 1
        if edge_depth(edge) + block + count > DEEPEST:
            return STORED  # deeper than any prompt: left out
    batch.seqs.used = 0
    seqs = <uint64_t*>stack_push(&batch.seqs, (2 * count if width > 1 else count) * sizeof(uint64_t), &offset)
    if seqs == NULL:
        return NO_ROOM
    if event.mark_count == 0:
        sequence_run(tokens, count, block_size, seed, parent_seq, seqs)
    else:
        local_hashes(tokens, count, block_size, seed, seqs)
        if mark_blocks(
            <Mark*>(batch.marks.data + event.marks),
            event.mark_count,
            tokens,
            count,
            block_size,
            seed,
            &batch.bytes,
            seqs,
        ):
            return NO_ROOM
        chain_hashes(seqs, count, parent_seq)
    if width > 1:
        wide_names(names, seqs, event.count, width, seqs + count)
        names = seqs + count
    if slot_store(tree, <uint32_t>lanes_slot(lanes, lane), edge, block, seed, names, seqs, count):
        return NO_ROOM
    return STORED


cdef inline Stored store_names(const Lanes* lanes, Tree* tree, const Event* event, Batch* batch) noexcept nogil:
    """Stores blocks that are named by hash alone; their lane has a slot, unless there are none.

    They are an offloaded copy, or those that a group without all blocks of a prompt has kept. Another lane of the same
    engine may know what the hashes stand for. Arguments as `store_tokens`.
    """
    cdef uint32_t lane = event_lane(event)
    cdef uint32_t width = max(lanes.groups[event.group].width, <uint32_t>1)
    cdef const uint64_t* names = event_names(event, batch)
    cdef uint32_t block = 0
    cdef Edge* edge
    cdef uint32_t i
    if <uint64_t>event.count * width > MOST_NAMES:
        return STORED
    for i in range(event.count):
        edge = lanes_find(lanes, tree, lane, names[i], &block)
        if edge != NULL and wide_store(
            tree, <uint32_t>lanes_slot(lanes, lane), edge, block, width, names[i], &batch.seqs
        ):
            return NO_ROOM
    return STORED
