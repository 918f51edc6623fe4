"""What staying with a prefix has cost so far: the rule by which a prefix gets another holder.

A request stays with the worker that has its prefix although another one would be ready sooner, because computing the
prefix once more is work that everybody pays for. For a conversation that is right: nobody else asks for its prefix. For
the system prompt of a busy API it is wrong: each of many requests waits, and a second copy would serve them all. Which
of the two a prefix is, only time tells. So every wait is counted, and when the waits for a prefix add up to the price of
a copy, a copy is made and counting starts again. This is the ski-rental rule (Karlin, Manasse, Rudolph, Sleator:
Competitive snoopy caching, Algorithmica 1988): whatever comes, it pays at most twice what knowing the future would.

The table is direct-mapped and forgets by being overwritten: a prefix that many wait for is back at once.
"""

from libc.stdint cimport uint64_t


cdef enum:
    PREFIXES = 4096  # a power of two


cdef struct Regret:
    uint64_t prefix  # sequence hash of its last block
    double tokens


cdef inline double regret_of(const Regret* table, uint64_t prefix) noexcept nogil:
    cdef const Regret* entry = &table[prefix & (PREFIXES - 1)]
    return entry.tokens if entry.prefix == prefix else 0.0


cdef inline void regret_set(Regret* table, uint64_t prefix, double tokens) noexcept nogil:
    cdef Regret* entry = &table[prefix & (PREFIXES - 1)]
    if entry.prefix != prefix and tokens == 0:
        return  # nothing to remember: leave what is there
    entry.prefix = prefix
    entry.tokens = tokens
