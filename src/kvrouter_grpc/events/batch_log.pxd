from libc.stdint cimport uint8_t, uint64_t


cdef enum:
    LOGGED = 1024  # batches whose content is remembered
    SEQ_BITS = 63  # the engines' numbers are signed


cdef class BatchLog:
    cdef public uint64_t next_seq
    cdef uint64_t[LOGGED] seqs  # each number has its place in this ring
    cdef uint64_t[LOGGED] contents  # hash, or 0 of a batch that was lost

    cdef bint append(self, uint64_t seq, const uint8_t* data, size_t size) noexcept
