"""`read_slot`: a slot from the bytes of slot_image.pxd, whatever they are."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from kvrouter_grpc.core.edge cimport Edge, cover_ensure, cover_tidy
from kvrouter_grpc.core.hash_table cimport Entry, table_find, table_reserve, table_shrink
from kvrouter_grpc.core.radix_tree cimport RadixTree
from kvrouter_grpc.core.run cimport LONGEST_RUN
from kvrouter_grpc.core.slot cimport (
    MOST_REFERENCES,
    Moves,
    _name,
    _settle_moves,
    named_place,
    place_edge,
    place_of,
    slot_clear,
    slot_store,
)
from kvrouter_grpc.core.slot_image cimport MOST_BLOCKS, Extra, Header, Stretch, image_words
from kvrouter_grpc.core.tree cimport DEEPEST, Tree, edge_depth


# The bytes, and where their parts begin. They may lie anywhere, so numbers are copied out.
cdef struct Image:
    Header header
    const uint8_t* stretches
    const uint8_t* hashes
    const uint8_t* presence
    const uint8_t* names
    const uint8_t* extras
    uint32_t longest  # blocks of a stretch


cdef inline uint64_t _u64(const uint8_t* at, uint64_t index) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at + index * sizeof(uint64_t), sizeof(uint64_t))
    return value


cdef inline bint _present(const Image* image, uint32_t block) noexcept nogil:
    return _u64(image.presence, block >> 6) >> (block & 63) & 1


cdef bint _open(Image* image, const uint8_t* data, uint64_t size) noexcept nogil:
    # False: these are not the bytes of a slot.
    cdef uint64_t blocks = 0
    cdef Stretch stretch
    cdef Extra extra
    cdef uint32_t i
    if size < sizeof(Header):
        return False
    memcpy(&image.header, data, sizeof(Header))
    blocks = image.header.blocks
    if blocks > MOST_BLOCKS or image.header.stretches > blocks or image.header.zero != 0:
        return False
    image.stretches = data + sizeof(Header)
    image.hashes = image.stretches + image.header.stretches * sizeof(Stretch)
    image.presence = image.hashes + blocks * sizeof(uint64_t)
    image.names = image.presence + image_words(blocks) * sizeof(uint64_t)
    image.extras = image.names + blocks * sizeof(uint64_t)
    if <uint64_t>(image.extras - data) + image.header.extras * sizeof(Extra) != size:
        return False
    blocks = 0
    image.longest = 0
    for i in range(image.header.stretches):
        memcpy(&stretch, image.stretches + i * sizeof(Stretch), sizeof(Stretch))
        blocks += stretch.blocks
        if stretch.blocks > image.longest:
            image.longest = stretch.blocks
        if stretch.blocks == 0 or stretch.blocks > LONGEST_RUN or stretch.parent > i or stretch.zero != 0:
            return False
    if blocks != image.header.blocks:
        return False
    for i in range(image.header.extras):
        memcpy(&extra, image.extras + i * sizeof(Extra), sizeof(Extra))
        if extra.block >= blocks or extra.references == 0 or extra.references > MOST_REFERENCES:
            return False
        if not _present(image, extra.block):
            return False
    return True


cdef int _build(Tree* tree, uint32_t scaffold, const Image* image) noexcept nogil:
    # Stores all stretches in the slot `scaffold`, where block i has the name i + 1. -1: no memory; -2: not the bytes of
    # a slot.
    cdef Stretch stretch
    cdef Edge* edge
    cdef uint32_t block = 0
    cdef size_t longest = image.longest if image.longest != 0 else 1
    cdef uint64_t* numbers = <uint64_t*>malloc(2 * longest * sizeof(uint64_t))
    cdef uint64_t* hashes = numbers + longest
    cdef uint64_t* bases = <uint64_t*>malloc((image.header.stretches + 1) * sizeof(uint64_t))
    cdef uint32_t i
    cdef uint32_t j
    cdef int failed = 0 if numbers != NULL and bases != NULL else -1
    if not failed:
        bases[0] = 0
        for i in range(image.header.stretches):
            memcpy(&stretch, image.stretches + i * sizeof(Stretch), sizeof(Stretch))
            bases[i + 1] = bases[i] + stretch.blocks
            edge = NULL
            block = 0
            if stretch.parent != 0:
                if stretch.offset == 0 or stretch.offset > bases[stretch.parent] - bases[stretch.parent - 1]:
                    failed = -2
                    break
                edge = _place(tree, scaffold, <uint32_t>(bases[stretch.parent - 1] + stretch.offset - 1), &block)
                block += 1
                if edge_depth(edge) + block + stretch.blocks > DEEPEST:
                    failed = -2
                    break
            for j in range(stretch.blocks):
                numbers[j] = bases[i] + j + 1
            memcpy(hashes, image.hashes + bases[i] * sizeof(uint64_t), stretch.blocks * sizeof(uint64_t))
            failed = slot_store(tree, scaffold, edge, block, stretch.seed, numbers, hashes, stretch.blocks)
            if failed:
                break
    free(numbers)
    free(bases)
    return failed


cdef inline Edge* _place(Tree* tree, uint32_t scaffold, uint32_t block, uint32_t* at) noexcept nogil:
    # Where a block of the image lies in the tree.
    return place_edge(tree, named_place(table_find(&tree.slots[scaffold].names, <uint64_t>block + 1)), at)


cdef int _give(
    Tree* tree, uint32_t slot, uint32_t scaffold, uint64_t name, uint32_t block, uint32_t references, Moves* moves
) noexcept nogil:
    # The slot stores a block of the image, `references` times.
    cdef uint32_t in_edge = 0
    cdef Edge* edge = _place(tree, scaffold, block, &in_edge)
    cdef Entry* entry = table_find(&tree.slots[slot].names, name)
    cdef uint64_t counted = references - 1
    cdef int at
    if entry != NULL and named_place(entry) == place_of(edge, in_edge):
        counted += entry.value & MOST_REFERENCES
    else:
        at = cover_ensure(&tree.meter, edge, slot)
        if at < 0 or _name(tree, slot, name, edge, <uint32_t>at, in_edge, moves):
            moves.failed = edge
            return -1
        cover_tidy(&tree.meter, edge, <uint32_t>at)
        entry = table_find(&tree.slots[slot].names, name)
    counted += 1
    entry.value = (entry.value & ~<uint64_t>MOST_REFERENCES) | (counted if counted < MOST_REFERENCES else MOST_REFERENCES)
    return 0


cdef int _fill(Tree* tree, uint32_t slot, uint32_t scaffold, const Image* image) noexcept nogil:
    cdef Moves moves
    cdef Extra extra
    cdef uint32_t i
    cdef int failed
    moves.places = NULL
    moves.failed = NULL
    moves.count = moves.capacity = 0
    failed = table_reserve(
        &tree.meter, &tree.slots[slot].names, <uint64_t>image.header.blocks + image.header.extras
    )
    if not failed:
        for i in range(image.header.blocks):
            if _present(image, i):
                failed = _give(tree, slot, scaffold, _u64(image.names, i), i, 1, &moves)
                if failed:
                    break
    if not failed:
        for i in range(image.header.extras):
            memcpy(&extra, image.extras + i * sizeof(Extra), sizeof(Extra))
            failed = _give(tree, slot, scaffold, extra.name, extra.block, extra.references, &moves)
            if failed:
                break
    _settle_moves(tree, slot, &moves)
    table_shrink(&tree.meter, &tree.slots[slot].names)
    return failed


def read_slot(RadixTree tree not None, slot, bytes data not None):
    """Puts back what `write_slot` wrote; see `slot_reader.pyi`."""
    cdef uint32_t index = tree._slot(slot)
    cdef uint32_t scaffold
    cdef Image image
    cdef int failed
    if tree.tree.slots[index].names.count != 0:
        raise ValueError("slot: it holds something already")
    if not _open(&image, <const uint8_t*>PyBytes_AS_STRING(data), <uint64_t>PyBytes_GET_SIZE(data)):
        raise ValueError("data: not what a slot holds")
    scaffold = tree.add_slot()
    try:
        failed = _build(&tree.tree, scaffold, &image)
        if not failed:
            failed = _fill(&tree.tree, index, scaffold, &image)
        if failed:
            slot_clear(&tree.tree, index)
    finally:
        tree.remove_slot(scaffold)
    if failed == -2:
        raise ValueError("data: not what a slot holds")
    if failed:
        raise MemoryError("the index is full")
