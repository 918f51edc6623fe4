"""What one slot of a tree holds, as bytes, and back.

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

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, memset

from kvrouter_grpc.core.edge cimport Edge, Run, cover_ensure, cover_tidy
from kvrouter_grpc.core.hash_table cimport Entry, table_find, table_reserve, table_shrink
from kvrouter_grpc.core.radix_tree cimport RadixTree
from kvrouter_grpc.core.run cimport LONGEST_RUN, OFFSET_BITS, run_edges, run_get
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
from kvrouter_grpc.core.tree cimport DEEPEST, Slot, Tree, edge_depth


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


cdef inline uint32_t _run_of(uint64_t place) noexcept nogil:
    return <uint32_t>(place >> OFFSET_BITS)


cdef inline uint32_t _offset_of(uint64_t place) noexcept nogil:
    return <uint32_t>(place & ((<uint64_t>1 << OFFSET_BITS) - 1))


# --- writing -----------------------------------------------------------------------------------------------------


# A run the slot needs.
cdef struct Need:
    Run* run
    uint32_t blocks  # how many of its first ones
    Run* parent  # NULL: it begins at the root
    uint32_t offset  # blocks of the parent before it


# Of a run, by its id.
cdef struct Mark:
    uint32_t need  # its place among the needs + 1; 0: not needed
    uint32_t blocks  # how many of its first ones are; later the number of the first in the bytes


cdef struct Survey:
    Need* needs
    uint32_t count
    uint32_t capacity


# One slot is written at a time, so all writes share the marks. They are clear in between.
cdef Mark* marks = NULL
cdef uint32_t marks_capacity = 0


cdef int _make_marks(uint32_t runs) noexcept nogil:
    global marks, marks_capacity
    cdef Mark* grown
    if runs <= marks_capacity:
        return 0
    grown = <Mark*>realloc(marks, runs * sizeof(Mark))
    if grown == NULL:
        return -1
    memset(grown + marks_capacity, 0, (runs - marks_capacity) * sizeof(Mark))
    marks = grown
    marks_capacity = runs
    return 0


cdef inline int _need(Survey* survey, const Tree* tree, uint32_t run, uint32_t blocks) noexcept nogil:
    # The slot needs this many blocks of a run; -1: no memory.
    cdef uint32_t capacity
    cdef Need* needs
    if blocks > marks[run].blocks:
        marks[run].blocks = blocks
    if marks[run].need != 0:
        return 0
    if survey.count == survey.capacity:
        capacity = survey.capacity * 2 + 64
        needs = <Need*>realloc(survey.needs, capacity * sizeof(Need))
        if needs == NULL:
            marks[run].blocks = 0
            return -1
        survey.needs = needs
        survey.capacity = capacity
    memset(&survey.needs[survey.count], 0, sizeof(Need))
    survey.needs[survey.count].run = run_get(&tree.runs, run)
    survey.count += 1
    marks[run].need = survey.count
    return 0


cdef int _by_depth(const void* left, const void* right) noexcept nogil:
    cdef uint32_t a = (<const Need*>left).run.depth
    cdef uint32_t b = (<const Need*>right).run.depth
    return (a > b) - (a < b)


cdef int64_t _survey(const Tree* tree, const Slot* slot, Survey* survey) noexcept nogil:
    # Finds the runs that the slot needs, parents first; how many blocks they are, or -1: no memory.
    cdef uint64_t place
    cdef int64_t blocks = 0
    cdef uint32_t i
    cdef Edge* parent
    cdef Need* need
    for i in range(slot.names.capacity):
        if slot.names.entries[i].value != 0:
            place = named_place(&slot.names.entries[i])
            if _need(survey, tree, _run_of(place), _offset_of(place) + 1):
                return -1
    i = 0
    while i < survey.count:  # which grows
        parent = run_edges(survey.needs[i].run)[0].parent
        if parent != NULL:
            if _need(survey, tree, parent.run.identity, parent.start + parent.length):
                return -1
            survey.needs[i].parent = parent.run
            survey.needs[i].offset = parent.start + parent.length
        i += 1
    if survey.count != 0:
        qsort(survey.needs, survey.count, sizeof(Need), _by_depth)  # a run lies deeper than the one it continues
    for i in range(survey.count):
        need = &survey.needs[i]
        need.blocks = marks[need.run.identity].blocks
        marks[need.run.identity].need = i + 1
        marks[need.run.identity].blocks = <uint32_t>blocks
        blocks += need.blocks
        if blocks > MOST_BLOCKS:
            return -1
    return blocks


cdef void _finish(Survey* survey) noexcept nogil:
    cdef uint32_t i
    for i in range(survey.count):
        memset(&marks[survey.needs[i].run.identity], 0, sizeof(Mark))
    free(survey.needs)


cdef void _write_runs(const Survey* survey, Stretch* stretches, uint64_t* hashes) noexcept nogil:
    cdef const Need* need
    cdef uint32_t i
    for i in range(survey.count):
        need = &survey.needs[i]
        memset(&stretches[i], 0, sizeof(Stretch))
        if need.parent != NULL:
            stretches[i].parent = marks[need.parent.identity].need
            stretches[i].offset = need.offset
        stretches[i].seed = need.run.seed
        stretches[i].blocks = need.blocks
        memcpy(hashes + marks[need.run.identity].blocks, need.run.hashes, need.blocks * sizeof(uint64_t))


cdef Extra* _write_names(const Slot* slot, uint64_t* presence, uint64_t* names, uint32_t* count) noexcept nogil:
    # Returns the extras, to be freed; NULL with `count` not 0: no memory.
    cdef Extra* extras = NULL
    cdef Extra* grown
    cdef uint32_t capacity = 0
    cdef uint32_t block
    cdef uint32_t references
    cdef uint64_t place
    cdef const Entry* entry
    cdef uint32_t i
    count[0] = 0
    for i in range(slot.names.capacity):
        entry = &slot.names.entries[i]
        if entry.value == 0:
            continue
        place = named_place(entry)
        block = marks[_run_of(place)].blocks + _offset_of(place)
        references = <uint32_t>(entry.value & MOST_REFERENCES)
        if not presence[block >> 6] >> (block & 63) & 1:
            presence[block >> 6] |= <uint64_t>1 << (block & 63)
            names[block] = entry.key
            references -= 1
        if references == 0:
            continue
        if count[0] == capacity:
            capacity = capacity * 2 + 16
            grown = <Extra*>realloc(extras, capacity * sizeof(Extra))
            if grown == NULL:
                free(extras)
                count[0] = 1
                return NULL
            extras = grown
        extras[count[0]].name = entry.key
        extras[count[0]].block = block
        extras[count[0]].references = references
        count[0] += 1
    return extras


cdef inline size_t _words(uint64_t blocks) noexcept nogil:
    return (blocks + 63) >> 6


def write_slot(RadixTree tree not None, slot):
    """What a slot holds, as bytes; see `snapshot.pyi`."""
    cdef Slot* written = &tree.tree.slots[tree._slot(slot)]
    cdef Survey survey
    cdef Header header
    cdef Extra* extras = NULL
    cdef int64_t blocks
    cdef size_t size
    cdef bytes data
    cdef char* at
    memset(&survey, 0, sizeof(survey))
    memset(&header, 0, sizeof(header))
    try:
        blocks = _survey(&tree.tree, written, &survey) if not _make_marks(tree.tree.runs.capacity) else -1
        if blocks < 0:
            raise MemoryError
        header.stretches = survey.count
        header.blocks = <uint32_t>blocks
        size = sizeof(Header) + survey.count * sizeof(Stretch) + (2 * blocks + _words(blocks)) * sizeof(uint64_t)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        at = PyBytes_AS_STRING(data) + sizeof(Header)
        _write_runs(&survey, <Stretch*>at, <uint64_t*>(at + survey.count * sizeof(Stretch)))
        at += survey.count * sizeof(Stretch) + blocks * sizeof(uint64_t)
        memset(at, 0, (blocks + _words(blocks)) * sizeof(uint64_t))
        extras = _write_names(written, <uint64_t*>at, <uint64_t*>at + _words(blocks), &header.extras)
        if extras == NULL and header.extras != 0:
            raise MemoryError
        memcpy(PyBytes_AS_STRING(data), &header, sizeof(header))
        if header.extras:
            data += PyBytes_FromStringAndSize(<char*>extras, header.extras * sizeof(Extra))
        return data
    finally:
        free(extras)
        _finish(&survey)


# --- reading -----------------------------------------------------------------------------------------------------


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
    image.names = image.presence + _words(blocks) * sizeof(uint64_t)
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
    """Puts back what `write_slot` wrote; see `snapshot.pyi`."""
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
