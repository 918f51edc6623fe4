"""What one slot of a tree holds, as bytes: the format that slot_writer.pyx writes and slot_reader.pyx reads.

    header     stretches u32, blocks u32, extras u32, zero u32
    stretches  each: parent u32, offset u32, seed u64, blocks u32, zero u32
    hashes     u64 per block: sequence hashes, stretch after stretch
    presence   bit per block: whether the slot holds it, in words of u64
    names      u64 per block: an engine hash that names it; 0 where the slot does not hold it
    extras     each: name u64, block u32, references u32, for what is named or stored more than once

A *stretch* is the front of a run: as much of it as the slot needs. It continues `offset` blocks into the stretch
`parent` - 1, which comes earlier, or begins at the root (0). What the slot does not hold itself is there only because
something below it is held. All numbers are little-endian. The reader trusts nothing: whatever it is given, the tree stays
consistent, and hashes that are none match no prompt.
"""

from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    MOST_BLOCKS = 1 << 28  # of one slot


cdef struct Header:
    uint32_t stretches
    uint32_t blocks
    uint32_t extras
    uint32_t zero


cdef struct Stretch:
    uint32_t parent
    uint32_t offset
    uint64_t seed
    uint32_t blocks
    uint32_t zero


cdef struct Extra:
    uint64_t name
    uint32_t block
    uint32_t references


cdef inline size_t image_words(uint64_t blocks) noexcept nogil:
    return (blocks + 63) >> 6
