"""`Decider`: from the tokens of a prompt to the target that should have it, in one compiled pass.

    hash     the prompt's blocks into sequence hashes
    match    one walk of the index and one of the pinned blocks give every target's overlap
    score    of every eligible row, by the mode: see mode.pxd and cost.pxd
    pick     see pick.pxd

The buffers between these steps belong to the decider and only ever grow, so a decision allocates nothing but its answer.
"""

import os
from array import array

cimport cython
from cpython cimport array as c_array
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from kvrouter_grpc.core.block_hash cimport as_u64, chain_hashes, local_hashes, rehash_multimodal, sequence_run
from kvrouter_grpc.core.choice cimport Choice, choice_of, choose
from kvrouter_grpc.core.cost cimport Ask, ask_init
from kvrouter_grpc.core.decision_log cimport DecisionLog
from kvrouter_grpc.core.mode cimport LOWEST_COST, Caller
from kvrouter_grpc.core.overlap cimport Found, Overlap, overlap_of
from kvrouter_grpc.core.pick cimport Dice
from kvrouter_grpc.core.policy cimport Policy
from kvrouter_grpc.core.question cimport Question, question_compare, question_loss
from kvrouter_grpc.core.recording cimport Recording, record
from kvrouter_grpc.core.regret cimport PREFIXES, Regret, regret_of, regret_set
from kvrouter_grpc.core.shared cimport shared_mark, shared_reach
from kvrouter_grpc.core.shortlist cimport Shortlist
from kvrouter_grpc.core.target cimport Groups, Target
from kvrouter_grpc.core.target_table cimport TargetTable
from kvrouter_grpc.core.walk cimport Step, tree_match, tree_path

cdef c_array.array U64 = array("Q")

cdef enum:
    MOST_BLOCKS = 1 << 20  # of a prompt
    USUAL = 64  # decisions after which a former habit has faded


@cython.final
cdef class Decider:
    """Answers where a prompt should go; the full description is in `decider.pyi`."""

    cdef readonly TargetTable table
    cdef readonly DecisionLog log
    cdef readonly double usual_new_tokens
    cdef public uint64_t turn
    cdef Dice dice
    cdef uint64_t* seqs
    cdef size_t seqs_capacity
    cdef size_t blocks  # of the last prompt
    cdef uint32_t* held  # see `Found`
    cdef size_t held_capacity
    cdef uint32_t* in_flight  # blocks of the prompt, by row
    cdef size_t in_flight_capacity
    cdef Overlap* overlaps  # of the rows that are asked
    cdef size_t overlaps_capacity
    cdef Step* steps
    cdef size_t steps_capacity
    cdef uint32_t* shared
    cdef size_t shared_capacity
    cdef uint8_t* marks  # by slot of the index
    cdef size_t marks_capacity
    cdef double* scores  # of the rows that are asked
    cdef size_t scores_capacity
    cdef Regret* regrets  # by prefix

    def __cinit__(self, TargetTable table not None, seed=None, DecisionLog log=None):
        self.table = table
        self.log = log
        self.regrets = <Regret*>calloc(PREFIXES, sizeof(Regret))
        if self.regrets == NULL:
            raise MemoryError
        self.dice.state = int.from_bytes(os.urandom(8), "little") if seed is None else as_u64("seed", seed)

    def __dealloc__(self):
        free(self.seqs)
        free(self.held)
        free(self.in_flight)
        free(self.overlaps)
        free(self.steps)
        free(self.shared)
        free(self.marks)
        free(self.scores)
        free(self.regrets)

    def decide(
        self,
        tokens not None,
        seed,
        Shortlist shortlist not None,
        Policy policy not None,
        str request_id="",
        *,
        mm_hashes=None,
        output_tokens=0,
        session=None,
        bint explain=False,
        bint remember=True,
        bint booked=False,
    ):
        """The row that should have the prompt."""
        cdef Question question
        cdef Caller caller
        cdef uint32_t chosen
        cdef Choice choice
        cdef Recording recording
        cdef DecisionLog log = self.log if remember else None
        cdef Dice dice = self.dice
        cdef uint32_t i
        question.weights = &policy.weights
        question.count = <uint32_t>len(shortlist.rows)
        question.rows = shortlist.rows.data.as_uints
        question.preferences = NULL
        caller.turn = self.turn
        caller.has_session = session is not None
        caller.session = as_u64("session", session) if session is not None else 0
        if question.count == 0:
            raise ValueError("the shortlist must have at least one row")
        if shortlist.preferences is not None:
            if <uint32_t>len(shortlist.preferences) != question.count:
                raise ValueError("the shortlist must have as many preferences as rows")
            question.preferences = shortlist.preferences.data.as_doubles
        for i in range(question.count):
            if question.rows[i] >= self.table.capacity or not self.table.rows[question.rows[i]].in_use:
                raise KeyError(f"row {question.rows[i]} is not in use")
        self._read(tokens, seed, mm_hashes, output_tokens, &question.ask)
        self._match(&question)
        question_compare(&question)
        if question.deepest:
            question.ask.regret = regret_of(self.regrets, self.seqs[question.deepest - 1])
        chosen = self._pick(&question, &caller, policy)
        choice = choice_of(&question, chosen, <uint32_t>self.blocks, policy, explain)
        if explain or log is not None:
            recording = record(&question, &caller, self.table.ledgers, dice, chosen, <uint32_t>self.blocks)
            recording.policy = policy
            recording.occasion = shortlist.occasion
            recording.request_id = request_id
            if log is not None:
                if log.hashes:
                    recording.sequence = self.sequence()
                log.put(recording)
            if explain:
                choice.recording = recording
        if booked:
            self.turn += 1
            if question.deepest and policy.mode == LOWEST_COST:
                self._learn(&question, chosen)
        self.usual_new_tokens += (<double>choice.new_tokens - self.usual_new_tokens) / USUAL
        return choice

    def sequence(self):
        """A copy of the sequence hashes of the last prompt."""
        cdef c_array.array seqs = c_array.clone(U64, <Py_ssize_t>self.blocks, False)
        if self.blocks:
            memcpy(seqs.data.as_ulonglongs, self.seqs, self.blocks * sizeof(uint64_t))
        return seqs

    # --- the prompt ------------------------------------------------------------------------------------------------

    cdef int _read(self, object tokens, object seed, object mm_hashes, object output_tokens, Ask* ask) except -1:
        # Hashes the prompt and fills `ask`.
        cdef Py_buffer view
        cdef uint64_t start = as_u64("seed", seed)
        cdef size_t size = self.table.index.block_size if self.table.index is not None else 0
        cdef size_t blocks
        PyObject_GetBuffer(tokens, &view, PyBUF_SIMPLE)
        try:
            if not isinstance(output_tokens, int) or not 0 <= output_tokens < 1 << 40:
                raise ValueError(f"output_tokens must be an integer in 0..2**40-1, not {output_tokens!r}")
            if view.itemsize != sizeof(uint32_t):
                raise ValueError(f"tokens: items of {view.itemsize} bytes, not u32")
            ask_init(ask, view.len // <Py_ssize_t>sizeof(uint32_t), output_tokens, <int64_t>size if size else 1)
            blocks = <size_t>ask.full_blocks if size else 0
            if blocks > MOST_BLOCKS:
                raise ValueError(f"tokens: {blocks} blocks in one prompt, the most is {MOST_BLOCKS}")
            self.blocks = 0  # until they are all there
            _room(<void**>&self.seqs, &self.seqs_capacity, blocks, sizeof(uint64_t))
            if mm_hashes:
                local_hashes(view.buf, blocks, size, start, self.seqs)
                rehash_multimodal(view.buf, blocks, size, start, mm_hashes, self.seqs)
                chain_hashes(self.seqs, blocks, NULL)
            else:
                sequence_run(view.buf, blocks, size, start, NULL, self.seqs)
            self.blocks = blocks
        finally:
            PyBuffer_Release(&view)
        return 0

    cdef int _match(self, Question* question) except -1:
        # Finds what every slot has of the prompt, and from that what every row has.
        cdef TargetTable table = self.table
        cdef Found found
        memset(&found, 0, sizeof(found))
        _room(<void**>&self.in_flight, &self.in_flight_capacity, table.pins.tree.slot_count, sizeof(uint32_t))
        tree_match(&table.pins.tree, self.seqs, self.blocks, self.in_flight)
        if table.index is not None:
            _room(<void**>&self.held, &self.held_capacity, table.index.tree.slot_count, sizeof(uint32_t))
            tree_match(&table.index.tree, self.seqs, self.blocks, self.held)
            found.held = self.held
            found.slots = table.index.tree.slot_count
            if table.on_path != 0:
                _room(<void**>&self.steps, &self.steps_capacity, self.blocks, sizeof(Step))
                found.path = tree_path(&table.index.tree, self.seqs, self.blocks, self.steps)
                found.steps = self.steps
                if question.weights.shared_cache:
                    self._share(question, &found)
        self._overlap(question, &found)
        return 0

    cdef int _share(self, const Question* question, Found* found) except -1:
        # Finds what of the prompt is in storage that all targets of the model read.
        cdef TargetTable table = self.table
        cdef uint64_t pool = table.ledgers[question.rows[0]].pool
        _room(<void**>&self.marks, &self.marks_capacity, found.slots, 1)
        _room(<void**>&self.shared, &self.shared_capacity, self.blocks + 1, sizeof(uint32_t))
        shared_mark(table.rows, table.ledgers, table.capacity, pool, self.marks, found.slots)
        found.shared_blocks = shared_reach(found.steps, found.path, self.marks, self.shared)
        found.shared = self.shared
        return 0

    cdef int _overlap(self, Question* question, const Found* found) except -1:
        # Once for all who ask: the comparison, the scores, the choice and the log.
        cdef TargetTable table = self.table
        cdef const Target* target
        cdef const Groups* groups
        cdef uint32_t row
        cdef uint32_t i
        _room(<void**>&self.overlaps, &self.overlaps_capacity, question.count, sizeof(Overlap))
        for i in range(question.count):
            row = question.rows[i]
            target = &table.rows[row]
            groups = table.ledgers[row].groups if target.grouped else NULL
            self.overlaps[i].in_flight = self.in_flight[row]
            if groups != NULL:  # its engine uses nothing behind the last cut that all of them allow
                self.overlaps[i].in_flight -= self.in_flight[row] % groups.step
            overlap_of(target, groups, found, <uint32_t>question.ask.usable_blocks, &self.overlaps[i])
        question.targets = table.rows
        question.overlaps = self.overlaps
        return 0

    # --- the choice --------------------------------------------------------------------------------------------------

    cdef uint32_t _pick(self, Question* question, const Caller* caller, Policy policy) except? 0xFFFFFFFF:
        _room(<void**>&self.scores, &self.scores_capacity, question.count, sizeof(double))
        return choose(question, caller, policy, self.table.ledgers, &self.dice, self.scores)

    cdef void _learn(self, const Question* question, uint32_t chosen) noexcept:
        # A prefix that is computed anew has another holder: what was regretted is made good.
        cdef double loss = question_loss(question, chosen)
        regret_set(
            self.regrets,
            self.seqs[question.deepest - 1],
            question.ask.regret + loss if 0 <= loss < INFINITY else 0.0,
        )


cdef int _room(void** buffer, size_t* capacity, size_t count, size_t size) except -1:
    # Makes room for `count` items of `size` bytes; what was in it is kept.
    cdef void* grown
    if count <= capacity[0]:
        return 0
    count += count >> 1
    grown = realloc(buffer[0], count * size)
    if grown == NULL:
        raise MemoryError
    buffer[0] = grown
    capacity[0] = count
    return 0
