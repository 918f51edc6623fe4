"""For the decider: the rows among which a decision chooses."""

from cpython cimport array as c_array


cdef class Shortlist:
    cdef readonly c_array.array rows
    cdef readonly object occasion
    cdef readonly c_array.array preferences  # None, or parallel to `rows`
