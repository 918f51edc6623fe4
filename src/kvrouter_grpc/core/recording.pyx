"""`Recording`: a decision with everything that it read, so that it can be explained later, and made again.

The rows are copied as they are, a cache line each, and what they had of the prompt beside them. Costs, scores and the
choice are worked out when somebody asks, by the functions that decided.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.math cimport isfinite
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from kvrouter_grpc.core.block_hash cimport as_u64
from kvrouter_grpc.core.choice cimport choice_of, choose, tie_rows
from kvrouter_grpc.core.cost cimport Ask, ask_init
from kvrouter_grpc.core.mode cimport Caller, mode_scores
from kvrouter_grpc.core.overlap cimport Overlap
from kvrouter_grpc.core.pick cimport Dice, chances
from kvrouter_grpc.core.policy cimport Policy
from kvrouter_grpc.core.question cimport Question, question_compare
from kvrouter_grpc.core.target cimport TIERS, Ledger, Target, active_blocks

cdef enum:
    MOST_ROWS = 1 << 20
    FACTS = 12  # told of a row

cdef int64_t MOST_TOKENS = <int64_t>1 << 40
cdef int64_t MOST_LOAD = <int64_t>1 << 48  # tokens or parts of blocks, either way: far from where sums overflow


@cython.final
@cython.freelist(64)
@cython.no_gc  # of what it refers to nothing refers to it
cdef class Recording:
    """A decision with everything that it read; the full description is in `recording.pyi`."""

    def __dealloc__(self):
        PyMem_Free(self.memory)

    cdef int _room(self, uint32_t count, bint preferences, bint identities) except -1:
        # Makes room for so many rows; the widest come first, so that all are aligned.
        cdef size_t each = sizeof(Target) + sizeof(Overlap) + sizeof(uint32_t)
        cdef char* at
        if preferences:
            each += sizeof(double)
        if identities:
            each += sizeof(uint64_t)
        self.bytes = count * each
        self.memory = PyMem_Malloc(self.bytes)
        if self.memory == NULL:
            raise MemoryError
        at = <char*>self.memory
        self.targets = <Target*>at
        at += count * sizeof(Target)
        if preferences:
            self.preferences = <double*>at
            at += count * sizeof(double)
        if identities:
            self.identities = <uint64_t*>at
            at += count * sizeof(uint64_t)
        self.overlaps = <Overlap*>at
        self.rows = <uint32_t*>(at + count * sizeof(Overlap))
        self.count = count
        return 0

    @staticmethod
    def restore(
        Policy policy not None,
        occasion,
        str request_id not None,
        *,
        double at,
        int64_t tokens,
        int64_t output_tokens,
        int64_t block_size,
        turn,
        session,
        dice,
        uint32_t picked,
        double regret,
        list rows not None,
    ):
        """A recording made of what `facts` of another one said."""
        cdef Recording self = Recording.__new__(Recording)
        cdef uint32_t i
        if not 0 < len(rows) <= MOST_ROWS or picked >= <uint32_t>len(rows):
            raise ValueError(f"{len(rows)} rows, of which number {picked} was picked")
        if not 0 <= tokens < MOST_TOKENS or not 0 <= output_tokens < MOST_TOKENS or not 0 <= block_size < 1 << 31:
            raise ValueError(f"{tokens} tokens, {output_tokens} of output, in blocks of {block_size}")
        if not isfinite(regret) or not isfinite(at):
            raise ValueError(f"a regret of {regret} at {at}")
        for facts in rows:
            if not isinstance(facts, tuple) or len(facts) != FACTS:
                raise ValueError(f"a row must be {FACTS} facts, not {facts!r:.80}")
        self.policy = policy
        self.occasion = occasion
        self.request_id = request_id
        self.at = at
        self.picked = picked
        self.caller.turn = as_u64("turn", turn)
        self.caller.has_session = session is not None
        self.caller.session = as_u64("session", session) if session is not None else 0
        self.dice.state = as_u64("dice", dice)
        ask_init(&self.ask, tokens, output_tokens, block_size if block_size else 1)
        self.ask.regret = regret
        self.blocks = <uint32_t>min(self.ask.full_blocks, 1 << 31) if block_size else 0
        self._room(<uint32_t>len(rows), any([facts[FACTS - 1] != 0 for facts in rows]), session is not None)
        memset(self.targets, 0, self.count * sizeof(Target))
        for i in range(self.count):
            _restore(self, i, rows[i])
        return self

    # --- what it read ----------------------------------------------------------------------------------------------

    @property
    def prompt_tokens(self):
        """Tokens of the prompt."""
        return self.ask.tokens

    @property
    def block_size(self):
        """Tokens per block; 0 while it was not known."""
        return self.ask.block_size if self.blocks or self.ask.block_size > 1 else 0

    @property
    def output_tokens(self):
        """Tokens that the answer was expected to have."""
        return self.ask.output_tokens

    @property
    def regret(self):
        """Of the prompt's prefix; see regret.pxd."""
        return self.ask.regret

    @property
    def turn(self):
        """Of mode round-robin."""
        return self.caller.turn

    @property
    def session(self):
        """Hash of the session, or None."""
        return self.caller.session if self.caller.has_session else None

    @property
    def seed(self):
        """The state of the random generator before the choice."""
        return self.dice.state

    def row(self, uint32_t i):
        """Row of the i-th candidate in the table."""
        if i >= self.count:
            raise IndexError(i)
        return self.rows[i]

    def facts(self):
        """What was read of every candidate."""
        cdef list said = []
        cdef const Target* target
        cdef const Overlap* overlap
        cdef uint32_t i
        for i in range(self.count):
            target = &self.targets[i]
            overlap = &self.overlaps[i]
            said.append(
                (
                    target.freshness,
                    target.queued_prefill_tokens,
                    target.private_parts,
                    target.pinned_blocks,
                    target.active_requests,
                    target.waiting_requests,
                    target.total_blocks,
                    target.on_cpu != 0,
                    (overlap.tiers[0], overlap.tiers[1], overlap.tiers[2], overlap.tiers[3]),
                    overlap.in_flight,
                    self.identities[i] if self.identities != NULL else 0,
                    self.preferences[i] if self.preferences != NULL else 0.0,
                )
            )
        return said

    def loads(self):
        """(active requests, waiting requests, queued prefill tokens, active blocks, total blocks) of each."""
        cdef uint32_t i
        return [
            (
                self.targets[i].active_requests,
                self.targets[i].waiting_requests,
                self.targets[i].queued_prefill_tokens,
                active_blocks(&self.targets[i]),
                self.targets[i].total_blocks,
            )
            for i in range(self.count)
        ]

    # --- the decision, once more -----------------------------------------------------------------------------------

    cdef int _ask_again(self, Policy policy, Question* question, uint32_t* rows) noexcept:
        # The question as it was, under a policy; the rows are those of the recording, in its order.
        cdef uint32_t i
        memset(question, 0, sizeof(Question))
        for i in range(self.count):
            rows[i] = i
        question.weights = &policy.weights
        question.ask = self.ask
        question.rows = rows
        question.preferences = self.preferences
        question.count = self.count
        question.targets = self.targets
        question.overlaps = self.overlaps
        question.ask.shortest_queue = 0
        question.ask.most_waiting = 0
        question_compare(question)
        return 0

    def candidates(self, Policy policy=None):
        """Every candidate with what it costs."""
        cdef Question question
        cdef uint32_t* rows = <uint32_t*>PyMem_Malloc(self.count * sizeof(uint32_t))
        cdef uint32_t i
        cdef list seen = []
        if rows == NULL:
            raise MemoryError
        try:
            policy = policy if policy is not None else self.policy
            self._ask_again(policy, &question, rows)
            for i in range(self.count):
                choice = choice_of(&question, i, self.blocks, policy, True)
                choice.row = self.rows[i]
                seen.append(choice)
            return seen
        finally:
            PyMem_Free(rows)

    def verdict(self, Policy policy=None):
        """(index of the candidate that is picked, score of each, chance of each)."""
        cdef Question question
        cdef Dice dice = self.dice
        cdef uint32_t i
        cdef size_t each = sizeof(Ledger) + 2 * sizeof(double) + sizeof(uint32_t)
        cdef char* memory = <char*>PyMem_Malloc(self.count * each)
        cdef Ledger* ledgers = <Ledger*>memory
        cdef double* scores = <double*>(memory + self.count * sizeof(Ledger))
        cdef double* shares = scores + self.count
        cdef uint32_t* rows = <uint32_t*>(shares + self.count)
        if memory == NULL:
            raise MemoryError
        try:
            policy = policy if policy is not None else self.policy
            self._ask_again(policy, &question, rows)
            memset(ledgers, 0, self.count * sizeof(Ledger))
            if self.identities != NULL:
                for i in range(self.count):
                    ledgers[i].identity = self.identities[i]
            mode_scores(&question, policy.mode, &policy.knobs, &self.caller, ledgers, &dice, scores)
            memcpy(shares, scores, self.count * sizeof(double))
            chances(shares, self.count, tie_rows(&question, policy), self.targets, policy.temperature)
            told = [scores[i] for i in range(self.count)]
            dice = self.dice
            picked = choose(&question, &self.caller, policy, ledgers, &dice, scores)
            return picked, told, [shares[i] for i in range(self.count)]
        finally:
            PyMem_Free(memory)


cdef int _restore(Recording self, uint32_t i, tuple facts) except -1:
    # The i-th row as `facts` told it.
    cdef Target* target = &self.targets[i]
    cdef Overlap* overlap = &self.overlaps[i]
    cdef uint32_t tier
    cdef int64_t held = 0
    (
        target.freshness,
        target.queued_prefill_tokens,
        target.private_parts,
        target.pinned_blocks,
        target.active_requests,
        target.waiting_requests,
        target.total_blocks,
        target.on_cpu,
        tiers,
        overlap.in_flight,
        identity,
        preference,
    ) = facts
    if not 0 <= target.freshness <= 1 or not isfinite(preference):
        raise ValueError(f"a freshness of {target.freshness} and a preference of {preference}")
    if abs(target.queued_prefill_tokens) > MOST_LOAD or abs(target.private_parts) > MOST_LOAD:
        raise ValueError(f"{target.queued_prefill_tokens} queued tokens, {target.private_parts} parts of blocks")
    overlap.tiers[0], overlap.tiers[1], overlap.tiers[2], overlap.tiers[3] = tiers
    for tier in range(<uint32_t>TIERS):
        held += overlap.tiers[tier]
    if max(held, <int64_t>overlap.in_flight) > self.blocks:
        raise ValueError(f"{held} blocks held and {overlap.in_flight} in flight of a prompt of {self.blocks}")
    target.in_use = True
    self.rows[i] = i
    if self.preferences != NULL:
        self.preferences[i] = preference
    if self.identities != NULL:
        self.identities[i] = as_u64("identity", identity)
    return 0


cdef Recording record(
    const Question* question, const Caller* caller, const Ledger* ledgers, Dice dice, uint32_t picked, uint32_t blocks
):
    """Copies what a decision read. Its policy and its occasion are the caller's to add."""
    cdef Recording self = Recording.__new__(Recording)
    cdef timespec now
    cdef uint32_t row
    cdef uint32_t i
    self._room(question.count, question.preferences != NULL, caller.has_session)
    for i in range(question.count):
        row = question.rows[i]
        self.rows[i] = row
        self.targets[i] = question.targets[row]
        if self.identities != NULL:
            self.identities[i] = ledgers[row].identity
    memcpy(self.overlaps, question.overlaps, question.count * sizeof(Overlap))
    if self.preferences != NULL:
        memcpy(self.preferences, question.preferences, question.count * sizeof(double))
    self.ask = question.ask
    self.caller = caller[0]
    self.dice = dice
    self.picked = picked
    self.blocks = blocks
    clock_gettime(CLOCK_REALTIME, &now)
    self.at = <double>now.tv_sec + <double>now.tv_nsec * 1e-9
    return self
