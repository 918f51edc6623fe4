"""`DecisionLog`: the last decisions, in a ring."""

cimport cython
from libc.stdint cimport uint64_t

from kvrouter_grpc.core.recording cimport Recording

cdef enum:
    MOST_BYTES = 64 << 20  # of rows; with very many workers fewer decisions are kept than asked for


@cython.final
cdef class DecisionLog:
    """The last decisions; the full description is in `decision_log.pyi`."""

    def __cinit__(self, uint64_t size, *, bint hashes=False):
        if not 0 < size <= 1 << 24:
            raise ValueError(f"size must be in 1..2**24, not {size}")
        self.size = size
        self.hashes = hashes
        self.ring = [None] * <Py_ssize_t>size

    def __len__(self):
        return self.count - self.oldest

    def since(self, uint64_t number, uint64_t most):
        """(number of the first, recordings): from `number` on, as far as they are left, at most so many."""
        cdef uint64_t i
        number = max(number, self.oldest)
        return number, [self.ring[i % self.size] for i in range(number, min(self.count, number + most))]

    cdef void _drop(self):
        cdef Recording recording = self.ring[self.oldest % self.size]
        self.bytes -= recording.bytes
        self.ring[self.oldest % self.size] = None
        self.oldest += 1

    cdef void put(self, Recording recording):
        if self.count - self.oldest == self.size:
            self._drop()
        self.bytes += recording.bytes
        self.ring[self.count % self.size] = recording
        self.count += 1
        while self.bytes > MOST_BYTES and self.count - self.oldest > 1:
            self._drop()
