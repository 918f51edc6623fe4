"""`TargetTable`: what every target holds and is busy with, in rows that a decision reads without Python objects.

Blocks of requests in flight are kept in a radix tree of their own, one slot per row: what is pinned is counted once
however many requests share it, one walk tells for all targets how much of a prompt is on its way to them, and the
index counts nothing but what engines hold.
"""

cimport cython
from cpython.array cimport array, clone
from libc.stdint cimport UINT32_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from kvrouter_grpc.core.block_hash cimport as_u64
from kvrouter_grpc.core.overlap cimport Found, Overlap, overlap_of
from kvrouter_grpc.core.path cimport path_unshared, slot_remove_path
from kvrouter_grpc.core.radix_tree cimport RadixTree
from kvrouter_grpc.core.shared cimport shared_mark, shared_reach
from kvrouter_grpc.core.slot cimport slot_store
from kvrouter_grpc.core.target cimport (
    MOST_GROUPS,
    NO_SLOT,
    PART_BITS,
    TIERS,
    Group,
    Groups,
    Ledger,
    Target,
    active_blocks,
    groups_list,
)
from kvrouter_grpc.core.walk cimport Step, tree_extend, tree_match, tree_path

cdef enum:
    ROW_BITS = 20  # of a ticket; the rest tells which of the row's targets, one after the other, was booked
    MOST_ROWS = 1 << 20
    MOST_BLOCKS = 1 << 20  # of one booking
    MOST_FOREIGN = 1 << 24  # requests
    BLOCK = 1 << PART_BITS  # parts
    UNKNOWN_BATCH_TOKENS = 10_000_000  # for an engine that tells none: more than any has

cdef array NO_ROWS = array("I")


@cython.final
cdef class TargetTable:
    """Rows of targets and what is booked on them; the full description is in `target_table.pyi`."""

    def __cinit__(self):
        self.found = {}
        self.pins = RadixTree(1)  # is given sequence hashes, so its block size does not matter

    def __dealloc__(self):
        cdef uint32_t row
        for row in range(self.capacity):
            if self.rows[row].in_use:
                free(self.ledgers[row].groups)
        free(self.rows)
        free(self.ledgers)

    # --- rows ----------------------------------------------------------------------------------------------------

    def add(self, target):
        """The row of a target, made when it is new."""
        cdef uint32_t row
        cdef uint32_t tier
        if target in self.found:
            return self.found[target]
        if len(self.found) == MOST_ROWS:
            raise ValueError(f"more than {MOST_ROWS} targets")
        row = self.pins.add_slot()
        try:
            self._grow(row)
        except MemoryError:
            self.pins.remove_slot(row)
            raise
        self.births += 1
        memset(&self.rows[row], 0, sizeof(Target))
        memset(&self.ledgers[row], 0, sizeof(Ledger))
        for tier in range(<uint32_t>TIERS):
            self.rows[row].slots[tier] = NO_SLOT
        self.rows[row].in_use = True
        self.ledgers[row].birth = self.births
        self.ledgers[row].batch_tokens = UNKNOWN_BATCH_TOKENS
        self.found[target] = row
        self.version += 1
        return row

    cdef int _grow(self, uint32_t row) except -1:
        # Makes room for a row. Fails with one of the two blocks grown at worst: then `capacity` is still right for both.
        cdef uint32_t capacity = self.capacity * 2 + 8
        cdef void* grown
        if row < self.capacity:
            return 0
        grown = realloc(self.rows, capacity * sizeof(Target))
        if grown == NULL:
            raise MemoryError
        self.rows = <Target*>grown
        grown = realloc(self.ledgers, capacity * sizeof(Ledger))
        if grown == NULL:
            raise MemoryError
        self.ledgers = <Ledger*>grown
        memset(self.rows + self.capacity, 0, (capacity - self.capacity) * sizeof(Target))
        self.capacity = capacity
        return 0

    def remove(self, target):
        """Forgets a target; its tickets are void."""
        cdef uint32_t row
        if target not in self.found:
            return
        row = self.found.pop(target)
        self.bookings -= self.rows[row].active_requests - self.ledgers[row].foreign_requests
        self._set_groups(row, NULL)
        self.on_path -= self.rows[row].lower_tiers != 0
        self.rows[row].in_use = False
        self.ledgers[row].birth = 0
        self.pins.remove_slot(row)
        self.version += 1
        if not self.found:
            free(self.rows)
            free(self.ledgers)
            self.rows = NULL
            self.ledgers = NULL
            self.capacity = 0

    def row(self, target):
        """The row of a target, or None."""
        return self.found.get(target)

    def __len__(self):
        return len(self.found)

    cdef Target* _row(self, row) except NULL:
        if not isinstance(row, int) or not 0 <= row < self.capacity or not self.rows[<uint32_t>row].in_use:
            raise KeyError(f"row {row!r} is not in use")
        return &self.rows[<uint32_t>row]

    # --- what a target holds ---------------------------------------------------------------------------------------

    def attach(self, RadixTree index not None):
        """Sets the index, once: the tree whose slots the rows name."""
        if self.index is not None:
            raise ValueError("the table has an index already")
        self.index = index

    def set_slot(self, row, tier, slot):
        """Where the index keeps the target's blocks of a tier."""
        cdef Target* target = self._row(row)
        cdef uint32_t known
        if not isinstance(tier, int) or not 0 <= tier < TIERS:
            raise ValueError(f"tier must be an integer in 0..{TIERS - 1}, not {tier!r}")
        if self.index is None:
            raise ValueError("the table has no index yet")
        known = self.index._slot(slot)
        if tier > 0 and target.slots[<uint32_t>tier] == NO_SLOT:
            self.on_path += target.lower_tiers == 0 and not target.grouped
            target.lower_tiers += 1
        target.slots[<uint32_t>tier] = known

    def set_groups(self, row, groups, step):
        """What the target's KV cache groups hold, when it has several."""
        cdef uint32_t index
        cdef uint32_t tier
        cdef uint32_t count = <uint32_t>len(groups)
        cdef Group* group
        cdef Groups* made
        self._row(row)
        if count > MOST_GROUPS or not isinstance(step, int) or not 1 <= step <= MOST_BLOCKS:
            raise ValueError(f"{count} groups with a step of {step!r}: at most {MOST_GROUPS}, and 1..{MOST_BLOCKS}")
        if count == 0:
            self._set_groups(row, NULL)
            return
        made = <Groups*>malloc(sizeof(Groups) + count * sizeof(Group))
        if made == NULL:
            raise MemoryError
        try:
            made.count = count
            made.step = step
            made.tiers = 0
            for index, (window, slots) in enumerate(groups):
                group = groups_list(made) + index
                group.window = window
                for tier, slot in zip(range(<uint32_t>TIERS), slots, strict=True):
                    group.slots[tier] = NO_SLOT if slot is None else self.index._slot(slot)
                    made.tiers |= <uint32_t>(slot is not None) << tier
        except BaseException:
            free(made)
            raise
        self._set_groups(row, made)

    cdef void _set_groups(self, uint32_t row, Groups* groups) noexcept:
        # Takes `groups` over.
        cdef Target* target = &self.rows[row]
        self.on_path -= target.lower_tiers != 0 or target.grouped
        free(self.ledgers[row].groups)
        self.ledgers[row].groups = groups
        target.grouped = groups != NULL
        self.on_path += target.lower_tiers != 0 or target.grouped

    def overlaps(self, rows, const uint64_t[::1] seqs not None, bint shared=False):
        """What targets hold of a prompt."""
        cdef size_t count = <size_t>seqs.shape[0]
        cdef uint32_t* held = NULL
        cdef Step* steps = NULL
        cdef Overlap overlap
        cdef uint32_t* reach = NULL
        cdef uint8_t* marks = NULL
        cdef uint64_t pool = 0
        cdef Target* target
        cdef Found found
        cdef uint32_t row
        if self.index is None or count == 0:
            return [(0, 0, 0, 0)] * len(rows)
        found.slots = self.index.tree.slot_count
        held = <uint32_t*>malloc(found.slots * sizeof(uint32_t) + 1)
        steps = <Step*>malloc(count * sizeof(Step))
        found.shared = NULL
        try:
            if shared:
                reach = <uint32_t*>malloc((count + 1) * sizeof(uint32_t))
                marks = <uint8_t*>malloc(found.slots + 1)
            if held == NULL or steps == NULL or shared and (reach == NULL or marks == NULL):
                raise MemoryError
            tree_match(&self.index.tree, &seqs[0], count, held)
            found.path = tree_path(&self.index.tree, &seqs[0], count, steps)
            found.held = held
            found.steps = steps
            answer = []
            for index in rows:
                target = self._row(index)
                row = index
                if shared and (found.shared == NULL or pool != self.ledgers[row].pool):
                    pool = self.ledgers[row].pool
                    shared_mark(self.rows, self.ledgers, self.capacity, pool, marks, found.slots)
                    found.shared_blocks = shared_reach(steps, found.path, marks, reach)
                    found.shared = reach
                overlap_of(target, self.ledgers[row].groups, &found, <uint32_t>count, &overlap)
                answer.append((overlap.tiers[0], overlap.tiers[1], overlap.tiers[2], overlap.tiers[3]))
            return answer
        finally:
            free(held)
            free(steps)
            free(reach)
            free(marks)

    def set_freshness(self, row, double freshness):
        """How far the index is to be trusted about the target."""
        if not 0 <= freshness <= 1:
            raise ValueError(f"freshness must be in 0..1, not {freshness}")
        self._row(row).freshness = freshness

    def describe(self, row, *, total_blocks=0, identity=0, pool=0, on_cpu=False, batch_tokens=0):
        """What a target is, as far as decisions ask."""
        cdef Target* target = self._row(row)
        self.ledgers[<uint32_t>row].identity = as_u64("identity", identity)
        self.ledgers[<uint32_t>row].pool = as_u64("pool", pool)
        self.ledgers[<uint32_t>row].batch_tokens = min(max(batch_tokens, 0), UINT32_MAX) or UNKNOWN_BATCH_TOKENS
        target.total_blocks = min(max(total_blocks, 0), UINT32_MAX)
        target.on_cpu = bool(on_cpu)

    # --- what it is busy with --------------------------------------------------------------------------------------

    def load(self, row):
        """(active requests, queued prefill tokens, active blocks), whoever sent them."""
        cdef Target* target = self._row(row)
        return target.active_requests, target.queued_prefill_tokens, active_blocks(target)

    def within(self, rows, double blocks, double prefill_tokens, double prefill_batches):
        """Those of some rows whose load is not above any limit; `rows` itself when that is all of them."""
        cdef const uint32_t[::1] asked = rows
        cdef uint32_t count = <uint32_t>asked.shape[0]
        cdef uint32_t kept = 0
        cdef uint32_t i
        cdef uint32_t row
        cdef array left
        for i in range(count):
            row = asked[i]
            if row >= self.capacity or not self.rows[row].in_use:
                raise KeyError(f"row {row} is not in use")
            kept += self._is_within(row, blocks, prefill_tokens, prefill_batches)
        if kept == count:
            return rows
        left = clone(NO_ROWS, kept, zero=False)
        kept = 0
        for i in range(count):
            if self._is_within(asked[i], blocks, prefill_tokens, prefill_batches):
                left.data.as_uints[kept] = asked[i]
                kept += 1
        return left

    cdef bint _is_within(self, uint32_t row, double blocks, double prefill_tokens, double prefill_batches) noexcept:
        cdef const Target* target = &self.rows[row]
        cdef double tokens = <double>target.queued_prefill_tokens
        if tokens > prefill_tokens or tokens > prefill_batches * <double>self.ledgers[row].batch_tokens:
            return False
        return target.total_blocks == 0 or <double>active_blocks(target) <= blocks * <double>target.total_blocks

    def waiting(self, row):
        """Requests without a first token, whoever sent them."""
        return self._row(row).waiting_requests

    def total_blocks(self, row):
        """The capacity of the target's cache; 0: not known."""
        return self._row(row).total_blocks

    def foreign(self, row):
        """(requests, of those waiting, prefill tokens, blocks) that did not come through this router."""
        self._row(row)
        cdef Ledger* ledger = &self.ledgers[<uint32_t>row]
        return (
            ledger.foreign_requests,
            ledger.foreign_waiting,
            ledger.foreign_prefill_tokens,
            ledger.foreign_parts >> PART_BITS,
        )

    def set_foreign(self, row, uint32_t requests, uint32_t waiting, uint32_t prefill_tokens, uint32_t blocks):
        """Replaces what is assumed to be there beside what was booked."""
        cdef Target* target = self._row(row)
        cdef Ledger* ledger = &self.ledgers[<uint32_t>row]
        cdef int64_t parts = <int64_t>blocks << PART_BITS
        if requests > MOST_FOREIGN or waiting > requests:
            raise ValueError(f"{requests} foreign requests, {waiting} of them waiting")
        target.active_requests += requests - ledger.foreign_requests
        target.waiting_requests += waiting - ledger.foreign_waiting
        target.queued_prefill_tokens += <int64_t>prefill_tokens - ledger.foreign_prefill_tokens
        target.private_parts += parts - ledger.foreign_parts
        ledger.foreign_requests = requests
        ledger.foreign_waiting = waiting
        ledger.foreign_prefill_tokens = prefill_tokens
        ledger.foreign_parts = parts

    def pinned(self, row, const uint64_t[::1] seqs not None):
        """Leading blocks of a prompt that requests in flight pin."""
        cdef size_t count = <size_t>seqs.shape[0]
        self._row(row)
        return tree_extend(&self.pins.tree, row, &seqs[0], count, 0) if count else 0

    def book(self, row, const uint64_t[::1] seqs not None, prefill_tokens, share):
        """Adds a request to the load of a target; the ticket to take it back with."""
        cdef Target* target = self._row(row)
        cdef uint32_t index = row
        cdef size_t count = <size_t>seqs.shape[0]
        cdef int64_t tokens = prefill_tokens
        if tokens < 0 or count > MOST_BLOCKS:
            raise ValueError(f"a request of {tokens} tokens to prefill and {count} blocks")
        if not share:
            target.private_parts += <int64_t>count << PART_BITS
        elif count:
            # Without memory some of the front stays pinned: too much load until the target goes, never too little.
            if slot_store(&self.pins.tree, index, NULL, 0, 0, &seqs[0], &seqs[0], count):
                raise MemoryError
            target.pinned_blocks = self.pins.tree.slots[index].names.count
        target.active_requests += 1
        target.waiting_requests += 1
        target.queued_prefill_tokens += tokens
        self.bookings += 1
        return self.ledgers[index].birth << ROW_BITS | index

    cdef Target* _booked(self, uint64_t ticket, uint32_t* row) noexcept:
        # The target that a ticket was given for, or NULL when that is gone.
        row[0] = <uint32_t>(ticket & (MOST_ROWS - 1))
        if row[0] >= self.capacity or not self.rows[row[0]].in_use or self.ledgers[row[0]].birth != ticket >> ROW_BITS:
            return NULL
        return &self.rows[row[0]]

    def first_token(self, uint64_t ticket, int64_t prefill_tokens):
        """Takes back what waited for its first token."""
        cdef uint32_t row = 0
        cdef Target* target = self._booked(ticket, &row)
        if target != NULL:
            target.waiting_requests -= 1
            target.queued_prefill_tokens -= prefill_tokens

    def generated(
        self, uint64_t ticket, const uint64_t[::1] seqs not None, share, uint32_t blocks, double weight, int64_t parts
    ):
        """Counts a request's output, and lets what is its own fade; the parts to take back at the end."""
        cdef uint32_t row = 0
        cdef Target* target = self._booked(ticket, &row)
        cdef size_t own = <size_t>seqs.shape[0]
        cdef int64_t each
        cdef int64_t now
        if not 0 <= weight <= 1 or blocks > MOST_BLOCKS:
            raise ValueError(f"an output of {blocks} blocks at a weight of {weight}")
        if target == NULL:
            return parts
        if share and own:
            own = path_unshared(&self.pins.tree.slots[row], &seqs[0], own)
        each = <int64_t>(weight * BLOCK)
        now = blocks * each - <int64_t>own * (BLOCK - each)
        target.private_parts += now - parts
        return now

    def release(self, uint64_t ticket, const uint64_t[::1] seqs not None, share, int64_t parts=0):
        """Takes back the rest of a booking."""
        cdef uint32_t row = 0
        cdef Target* target = self._booked(ticket, &row)
        cdef size_t count = <size_t>seqs.shape[0]
        if target == NULL:
            return
        target.active_requests -= 1
        self.bookings -= 1
        target.private_parts -= parts
        if not share:
            target.private_parts -= <int64_t>count << PART_BITS
        elif count:
            slot_remove_path(&self.pins.tree, row, &seqs[0], count)
            target.pinned_blocks = self.pins.tree.slots[row].names.count

    def stats(self):
        """Sizes."""
        cdef uint64_t pinned = 0
        cdef uint32_t row
        for row in self.found.values():
            pinned += self.rows[row].pinned_blocks
        return {
            "rows": len(self.found),
            "bookings": self.bookings,
            "pinned_blocks": pinned,
            "bytes": self.capacity * (sizeof(Target) + sizeof(Ledger)) + self.pins.tree.meter.used,
        }
