"""`BatchLog`: where a stream stands, and what its last batches contained.

A late copy of a batch is told from the batch that a restarted publisher sends under the same number by its content. The
receiver writes here once per message, so this is compiled.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from kvrouter_grpc.core.block_hash cimport XXH3_64bits_withSeed

HIGHEST_SEQ = (1 << 63) - 1
REMEMBERED = LOGGED
SAME, OTHER, LOST, UNKNOWN = range(4)

cdef enum:
    NO_CONTENT = 0


cdef inline uint64_t _hash(const uint8_t* data, size_t size) noexcept nogil:
    return XXH3_64bits_withSeed(data, size, 0) | 1  # never `NO_CONTENT`


@cython.final
cdef class BatchLog:
    """What is known of the batches taken; described in `batch_log.pyi`."""

    def __cinit__(self):
        self.clear()

    cdef bint append(self, uint64_t seq, const uint8_t* data, size_t size) noexcept:
        if seq != self.next_seq:
            return False
        self.seqs[seq % LOGGED] = seq
        self.contents[seq % LOGGED] = _hash(data, size)
        self.next_seq = seq + 1
        return True

    def follow(self, uint64_t seq, bytes payload not None):
        """Takes the batch if it is the next; see `batch_log.pyi`."""
        return self.append(seq, <const uint8_t*>PyBytes_AS_STRING(payload), <size_t>PyBytes_GET_SIZE(payload))

    def note(self, uint64_t seq, bytes payload not None):
        """Remembers a batch."""
        self.note_hash(seq, _hash(<const uint8_t*>PyBytes_AS_STRING(payload), <size_t>PyBytes_GET_SIZE(payload)))

    def note_lost(self, uint64_t seq):
        """Remembers that a batch was given up."""
        self.note_hash(seq, NO_CONTENT)

    def note_hash(self, uint64_t seq, uint64_t content):
        """Remembers a batch by its hash."""
        self.seqs[seq % LOGGED] = seq
        self.contents[seq % LOGGED] = content

    @property
    def last_content(self):
        """The hash of the last batch, 0 when nothing was noted of it."""
        cdef uint64_t seq = self.next_seq - 1
        return self.contents[seq % LOGGED] if self.next_seq and self.seqs[seq % LOGGED] == seq else NO_CONTENT

    def forget(self, uint64_t seq):
        """Forgets a batch; its hash."""
        if self.seqs[seq % LOGGED] != seq:
            return NO_CONTENT
        self.seqs[seq % LOGGED] = <uint64_t>-1
        return self.contents[seq % LOGGED]

    def compare(self, uint64_t seq, bytes payload not None):
        """How a copy of a batch compares with the one that was taken; see `batch_log.pyi`."""
        cdef uint64_t content = self.contents[seq % LOGGED]
        if self.seqs[seq % LOGGED] != seq:
            return UNKNOWN
        if content == NO_CONTENT:
            return LOST
        if content == _hash(<const uint8_t*>PyBytes_AS_STRING(payload), <size_t>PyBytes_GET_SIZE(payload)):
            return SAME
        return OTHER

    def clear(self):
        """Knows nothing."""
        self.next_seq = 0
        memset(self.seqs, 0xFF, sizeof(self.seqs))  # a number that no batch has
