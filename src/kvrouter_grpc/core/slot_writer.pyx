"""`write_slot`: what one slot of a tree holds, as the bytes of slot_image.pxd."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, qsort, realloc
from libc.string cimport memcpy, memset

from kvrouter_grpc.core.edge cimport Edge, Run
from kvrouter_grpc.core.hash_table cimport Entry
from kvrouter_grpc.core.radix_tree cimport RadixTree
from kvrouter_grpc.core.run cimport OFFSET_BITS, run_edges, run_get
from kvrouter_grpc.core.slot cimport MOST_REFERENCES, named_place
from kvrouter_grpc.core.slot_image cimport MOST_BLOCKS, Extra, Header, Stretch, image_words
from kvrouter_grpc.core.tree cimport Slot, Tree


cdef inline uint32_t _run_of(uint64_t place) noexcept nogil:
    return <uint32_t>(place >> OFFSET_BITS)


cdef inline uint32_t _offset_of(uint64_t place) noexcept nogil:
    return <uint32_t>(place & ((<uint64_t>1 << OFFSET_BITS) - 1))


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


def write_slot(RadixTree tree not None, slot):
    """What a slot holds, as bytes; see `slot_writer.pyi`."""
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
        size = sizeof(Header) + survey.count * sizeof(Stretch) + (2 * blocks + image_words(blocks)) * sizeof(uint64_t)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        at = PyBytes_AS_STRING(data) + sizeof(Header)
        _write_runs(&survey, <Stretch*>at, <uint64_t*>(at + survey.count * sizeof(Stretch)))
        at += survey.count * sizeof(Stretch) + blocks * sizeof(uint64_t)
        memset(at, 0, (blocks + image_words(blocks)) * sizeof(uint64_t))
        extras = _write_names(written, <uint64_t*>at, <uint64_t*>at + image_words(blocks), &header.extras)
        if extras == NULL and header.extras != 0:
            raise MemoryError
        memcpy(PyBytes_AS_STRING(data), &header, sizeof(header))
        if header.extras:
            data += PyBytes_FromStringAndSize(<char*>extras, header.extras * sizeof(Extra))
        return data
    finally:
        free(extras)
        _finish(&survey)
