"""For the decider: what a `Policy` says."""

from kvrouter_grpc.core.cost cimport Weights
from kvrouter_grpc.core.mode cimport Knobs, Mode


cdef class Policy:
    cdef Weights weights
    cdef Mode mode
    cdef Knobs knobs
    cdef readonly double temperature
    cdef bint fewest_requests  # break ties
    cdef readonly tuple terms
    cdef readonly str cost
    cdef readonly str mode_name
