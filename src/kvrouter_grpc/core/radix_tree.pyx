"""`RadixTree`: which slot holds which blocks, and how much of a prompt's prefix.

This is the Python face: it checks what comes in and calls the C-level parts, which know no Python objects.

    radix_tree.pyx   the face                     walk.pxd         reading: match, extend
    slot.pxd         engine hashes, references    tree.pxd         branching, splitting, merging, pruning
    edge.pxd         runs, edges, covers          run.pxd          runs by id, edges of a run
    holes.pxd        bit sets for gaps            hash_table.pxd   u64 -> u64
    memory.pxd       counted memory               invariants.pxd   what must hold after every call
    path.pxd         taking whole paths back      doubt.pxd        what is left after lost events
"""

import os
from array import array

cimport cython
from cpython cimport array as c_array
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from kvrouter_grpc.core.block_hash cimport (
    LARGEST_BLOCK,
    as_u64,
    chain_hashes,
    local_hashes,
    rehash_multimodal,
    sequence_run,
)
from kvrouter_grpc.core.doubt cimport slot_doubt, slot_drop_doubted
from kvrouter_grpc.core.edge cimport Edge
from kvrouter_grpc.core.hash_table cimport Entry, table_find, table_init
from kvrouter_grpc.core.invariants cimport tree_check
from kvrouter_grpc.core.memory cimport release, resize
from kvrouter_grpc.core.path cimport slot_remove_path
from kvrouter_grpc.core.slot cimport named_place, place_edge, slot_clear, slot_copy, slot_foresee, slot_remove, slot_store
from kvrouter_grpc.core.tree cimport DEEPEST, Slot, edge_depth
from kvrouter_grpc.core.walk cimport tree_extend, tree_match

cdef c_array.array U32 = array("I")

cdef enum:
    MOST_BLOCKS = 1 << 20  # in one call: bounds the memory that a hostile event can make us take


@cython.final
cdef class RadixTree:
    """An index of cached blocks; the full description is in `radix_tree.pyi`."""

    def __cinit__(self, block_size, *, max_bytes=0):
        memset(&self.tree, 0, sizeof(self.tree))
        if not isinstance(block_size, int) or not 1 <= block_size <= LARGEST_BLOCK:
            raise ValueError(f"block_size must be an integer in 1..{LARGEST_BLOCK}, not {block_size!r}")
        self.block_size = block_size
        self.tree.meter.limit = as_u64("max_bytes", max_bytes)
        self.tree.salt = int.from_bytes(os.urandom(8), "little")
        table_init(&self.tree.children, self.tree.salt)

    def __dealloc__(self):
        cdef uint32_t slot
        for slot in range(self.tree.slot_count):
            slot_clear(&self.tree, slot)
        release(&self.tree.meter, self.tree.slots, self.tree.slot_capacity * sizeof(Slot))

    # --- slots ---------------------------------------------------------------------------------------------------

    def add_slot(self):
        """The lowest free slot id, now in use."""
        cdef uint32_t slot = 0
        cdef uint32_t capacity
        cdef Slot* slots
        while slot < self.tree.slot_count and self.tree.slots[slot].used:
            slot += 1
        if slot == self.tree.slot_capacity:
            capacity = slot * 2 + 8
            slots = <Slot*>resize(
                &self.tree.meter, self.tree.slots, slot * sizeof(Slot), capacity * sizeof(Slot)
            )
            if slots == NULL:
                raise MemoryError
            self.tree.slots = slots
            self.tree.slot_capacity = capacity
        if slot == self.tree.slot_count:
            self.tree.slot_count += 1
        table_init(&self.tree.slots[slot].names, self.tree.salt)
        table_init(&self.tree.slots[slot].aliases, self.tree.salt)
        self.tree.slots[slot].stored = 0
        self.tree.slots[slot].used = True
        return slot

    def remove_slot(self, slot):
        """Clears a slot and frees its id."""
        cdef uint32_t index = self._slot(slot)
        slot_clear(&self.tree, index)
        self.tree.slots[index].used = False
        while self.tree.slot_count > 0 and not self.tree.slots[self.tree.slot_count - 1].used:
            self.tree.slot_count -= 1
        if self.tree.slot_count == 0:
            release(&self.tree.meter, self.tree.slots, self.tree.slot_capacity * sizeof(Slot))
            self.tree.slots = NULL
            self.tree.slot_capacity = 0

    def clear(self, slot):
        """Drops all that a slot holds; how many blocks that were."""
        cdef uint32_t index = self._slot(slot)
        cdef uint32_t dropped = self.tree.slots[index].names.count
        slot_clear(&self.tree, index)
        return dropped

    cdef uint32_t _slot(self, slot) except? 0:
        if not isinstance(slot, int) or not 0 <= slot < self.tree.slot_count or not self.tree.slots[<uint32_t>slot].used:
            raise KeyError(f"slot {slot!r} is not in use")
        return slot

    # --- events --------------------------------------------------------------------------------------------------

    def store(
        self,
        slot,
        parent,
        const uint64_t[::1] engine_hashes not None,
        const uint32_t[::1] tokens not None,
        seed,
        mm_hashes=None,
        parent_slot=-1,
    ):
        """Stores blocks below a parent block or the root; False: the parent is unknown."""
        cdef uint32_t index = self._slot(slot)
        cdef uint32_t parent_index = index if parent_slot == -1 else self._slot(parent_slot)
        cdef uint64_t start_seed = as_u64("seed", seed)
        cdef size_t count = _count("engine_hashes", engine_hashes)
        cdef Edge* edge = NULL
        cdef uint32_t block = 0
        cdef const uint64_t* parent_seq = NULL
        cdef uint64_t* seqs
        cdef int failed
        if <size_t>tokens.shape[0] // self.block_size < count:
            raise ValueError(
                f"tokens: {count} blocks of {self.block_size} need {count * self.block_size} token ids,"
                f" not {tokens.shape[0]}"
            )
        if parent is not None:
            edge = self._find(parent_index, as_u64("parent", parent), &block)
            if edge == NULL:
                return False
            parent_seq = &edge.run.hashes[edge.start + block]
            start_seed = edge.run.seed
            block += 1
            if edge_depth(edge) + block + count > DEEPEST:
                raise ValueError(f"engine_hashes: a prompt of more than {DEEPEST} blocks")
        if count == 0:
            return True
        slot_foresee(&self.tree.slots[index], &engine_hashes[0], count)
        seqs = <uint64_t*>malloc(count * sizeof(uint64_t))
        if seqs == NULL:
            raise MemoryError
        try:
            if mm_hashes:
                local_hashes(&tokens[0], count, self.block_size, start_seed, seqs)
                rehash_multimodal(&tokens[0], count, self.block_size, start_seed, mm_hashes, seqs)
                chain_hashes(seqs, count, parent_seq)
            else:
                sequence_run(&tokens[0], count, self.block_size, start_seed, parent_seq, seqs)
            failed = slot_store(&self.tree, index, edge, block, start_seed, &engine_hashes[0], seqs, count)
        finally:
            free(seqs)
        if failed:
            raise MemoryError("the index is full")
        return True

    def store_path(self, slot, const uint64_t[::1] seqs not None, seed):
        """Stores a path from the root whose engine hashes are its sequence hashes."""
        cdef uint32_t index = self._slot(slot)
        cdef size_t count = _count("seqs", seqs)
        if count and slot_store(&self.tree, index, NULL, 0, as_u64("seed", seed), &seqs[0], &seqs[0], count):
            raise MemoryError("the index is full")

    def store_known(self, slot, from_slot, const uint64_t[::1] engine_hashes not None):
        """Stores those engine hashes that another slot knows; how many those were."""
        cdef uint32_t index = self._slot(slot)
        cdef uint32_t source = self._slot(from_slot)
        cdef size_t count = _count("engine_hashes", engine_hashes)
        cdef int64_t known = slot_copy(&self.tree, index, source, &engine_hashes[0], count) if count else 0
        if known < 0:
            raise MemoryError("the index is full")
        return known

    def remove(self, slot, const uint64_t[::1] engine_hashes not None):
        """Takes one reference from each engine hash; how many were unknown."""
        cdef uint32_t index = self._slot(slot)
        cdef size_t count = _count("engine_hashes", engine_hashes)
        cdef int64_t unknown
        if count == 0:
            return 0
        slot_foresee(&self.tree.slots[index], &engine_hashes[0], count)
        unknown = slot_remove(&self.tree, index, &engine_hashes[0], count)
        if unknown < 0:
            raise MemoryError("the index is full")
        return unknown

    def remove_path(self, slot, const uint64_t[::1] seqs not None):
        """Takes back what `store_path` stored."""
        cdef uint32_t index = self._slot(slot)
        cdef size_t count = _count("seqs", seqs)
        if count and slot_remove_path(&self.tree, index, &seqs[0], count):
            raise MemoryError("the index is full")

    def doubt(self, slot):
        """Doubts all that a slot holds; how many engine hashes that are."""
        return slot_doubt(&self.tree, self._slot(slot))

    def drop_doubted(self, slot, most, *, prefixes=False):
        """Drops doubted blocks that nobody has vouched for, at most `most`; how many."""
        cdef uint32_t index = self._slot(slot)
        cdef int64_t dropped
        if not isinstance(most, int) or not 1 <= most <= MOST_BLOCKS:
            raise ValueError(f"most must be an integer in 1..{MOST_BLOCKS}, not {most!r}")
        dropped = slot_drop_doubted(&self.tree, index, prefixes, most)
        if dropped < 0:
            raise MemoryError("the index is full")
        return dropped

    # --- questions -----------------------------------------------------------------------------------------------

    cdef Edge* _find(self, uint32_t slot, uint64_t name, uint32_t* block) noexcept nogil:
        cdef Entry* entry = table_find(&self.tree.slots[slot].names, name)
        return NULL if entry == NULL else place_edge(&self.tree, named_place(entry), block)

    def holds(self, slot, engine_hash):
        """Whether the slot holds a block of this engine hash."""
        cdef uint32_t index = self._slot(slot)
        return table_find(&self.tree.slots[index].names, as_u64("engine_hash", engine_hash)) != NULL

    def position(self, slot, engine_hash):
        """(sequence hash, depth) of an engine hash, or None."""
        cdef uint32_t index = self._slot(slot)
        cdef uint32_t block = 0
        cdef Edge* edge = self._find(index, as_u64("engine_hash", engine_hash), &block)
        return None if edge == NULL else (edge.run.hashes[edge.start + block], edge_depth(edge) + block)

    def match(self, const uint64_t[::1] seqs not None, c_array.array out=None):
        """Blocks of the prefix that each slot holds; index = slot."""
        cdef size_t count = _count("seqs", seqs)
        if out is None:
            out = c_array.clone(U32, self.tree.slot_count, False)
        elif out.typecode != "I":
            raise ValueError(f"out must be an array('I'), not array({out.typecode!r})")
        elif <size_t>len(out) < self.tree.slot_count:
            raise ValueError(f"out has {len(out)} entries, the slots need {self.tree.slot_count}")
        elif len(out):
            memset(out.data.as_uints, 0, <size_t>len(out) * sizeof(uint32_t))
        tree_match(&self.tree, &seqs[0] if count else NULL, count, <uint32_t*>out.data.as_uints)
        return out

    def extend(self, const uint64_t[::1] seqs not None, slot, start):
        """Contiguous blocks held by `slot` from position `start` on."""
        cdef uint32_t index = self._slot(slot)
        cdef size_t count = _count("seqs", seqs)
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"start must be a non-negative integer, not {start!r}")
        if start >= count:
            return 0
        return tree_extend(&self.tree, index, &seqs[0], count, start)

    def blocks(self, slot):
        """Distinct engine hashes the slot holds."""
        cdef uint32_t index = self._slot(slot)
        return self.tree.slots[index].names.count

    def stored(self, slot):
        """Blocks stored in the slot since it was added."""
        return self.tree.slots[self._slot(slot)].stored

    def stats(self):
        """Sizes and counters."""
        cdef uint32_t slot
        cdef uint64_t blocks = 0
        cdef uint64_t used = 0
        for slot in range(self.tree.slot_count):
            if self.tree.slots[slot].used:
                used += 1
                blocks += self.tree.slots[slot].names.count
        return {
            "slots": used,
            "blocks": blocks,
            "edges": self.tree.edges,
            "runs": self.tree.runs.count,
            "bytes": self.tree.meter.used,
            "splits": self.tree.splits,
            "merges": self.tree.merges,
            "duplicates": self.tree.duplicates,
            "conflicts": self.tree.conflicts,
            "unknown_removes": self.tree.unknown_removes,
        }

    def _check(self):
        """Raises AssertionError unless every link, size and count of the tree agrees with the others. For tests."""
        tree_check(&self.tree)


cdef size_t _count(str name, const uint64_t[::1] hashes) except? 0:
    cdef size_t count = <size_t>hashes.shape[0]
    if count > MOST_BLOCKS:
        raise ValueError(f"{name}: {count} blocks in one call, the most is {MOST_BLOCKS}")
    if count and <uintptr_t>&hashes[0] % sizeof(uint64_t):
        raise ValueError(f"{name}: the buffer is not aligned to {sizeof(uint64_t)} bytes")
    return count
