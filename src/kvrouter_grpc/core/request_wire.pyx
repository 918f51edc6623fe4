"""Takes the token ids out of a request as it is on the wire, without an object per token.

A request that carries a prompt has its token ids in field 1, `repeated fixed32`: packed, that is an array of
little-endian u32, which is hashed where it lies. Everything else is left to protobuf's own parser.

The encoding: https://protobuf.dev/programming-guides/encoding/
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from kvrouter_grpc.core.token_ids cimport TokenIds, token_ids_in

ctypedef const unsigned char* Place

cdef enum:  # wire types
    VARINT = 0
    FIXED64 = 1
    LEN = 2
    START_GROUP = 3
    END_GROUP = 4
    FIXED32 = 5

cdef enum:
    # As protobuf's parser has them.
    LONGEST_TAG = 5
    LONGEST_LENGTH = 5
    LONGEST_VARINT = 10
    LARGEST_LENGTH = 0x7FFFFFFF  # of a value
    DEEPEST_GROUP = 100


cdef struct Field:
    uint32_t tag  # number << 3 | wire type
    Place content
    Place end


cdef struct Contents:
    uint64_t fields  # bit n: field n is there; bit 0: one beyond 63
    size_t ids  # in bytes, as the next
    size_t rest
    uint32_t id_spans
    uint32_t rest_spans
    Place first_ids
    Place first_rest


cdef inline Place read_varint(Place place, Place end, int longest, uint64_t* value) noexcept nogil:
    """Reads a number of at most `longest` bytes; where it ends, or NULL."""
    cdef int i
    value[0] = 0
    for i in range(longest):
        if place + i == end:
            return NULL
        value[0] |= <uint64_t>(place[i] & 0x7F) << (7 * i)
        if place[i] < 0x80:
            return place + i + 1
    return NULL


cdef inline Place read_tag(Place place, Place end, uint32_t* tag) noexcept nogil:
    cdef uint64_t value
    place = read_varint(place, end, LONGEST_TAG, &value)
    if place == NULL or value >> 32:
        return NULL
    tag[0] = <uint32_t>value
    return place


cdef inline Place skip_value(Place place, Place end, uint32_t wire_type, Place* content) noexcept nogil:
    """The end of a value that is no group, or NULL; its content starts behind its length if it has one."""
    cdef uint64_t length
    content[0] = place
    if wire_type == LEN:
        place = content[0] = read_varint(place, end, LONGEST_LENGTH, &length)
        if place == NULL or length > LARGEST_LENGTH:
            return NULL
    elif wire_type == VARINT:
        return read_varint(place, end, LONGEST_VARINT, &length)
    elif wire_type == FIXED32:
        length = 4
    elif wire_type == FIXED64:
        length = 8
    else:
        return NULL
    return place + length if length <= <uint64_t>(end - place) else NULL


cdef Place skip_group(Place place, Place end, uint32_t start) noexcept nogil:
    """The end of the group that the tag `start` opened, or NULL."""
    cdef uint32_t closes[DEEPEST_GROUP]  # the tags that end the open groups, outermost first
    cdef int depth = 1
    cdef uint32_t tag
    cdef Place content
    closes[0] = start + 1  # END_GROUP of the same number
    while depth:
        place = read_tag(place, end, &tag)
        if place == NULL:
            return NULL
        if tag & 7 == START_GROUP:
            if depth == DEEPEST_GROUP:
                return NULL
            closes[depth] = tag + 1
            depth += 1
        elif tag & 7 == END_GROUP:
            depth -= 1
            if tag != closes[depth]:
                return NULL
        else:
            place = skip_value(place, end, tag & 7, &content)
            if place == NULL:
                return NULL
    return place


cdef inline bint next_field(Place place, Place end, Field* field) noexcept nogil:
    """Reads the field at `place`; False when there is none."""
    place = field.content = read_tag(place, end, &field.tag)
    if place == NULL or field.tag < 8:  # there is no field 0
        return False
    if field.tag & 7 == START_GROUP:
        field.end = skip_group(place, end, field.tag)
    else:
        field.end = skip_value(place, end, field.tag & 7, &field.content)
    return field.end != NULL


cdef inline bint holds_ids(const Field* field) noexcept nogil:
    return field.tag == (1 << 3 | LEN) or field.tag == (1 << 3 | FIXED32)


cdef bint measure(Place place, Place end, Contents* found) noexcept nogil:
    """Counts what belongs to field 1 and what does not; False when they are no message."""
    cdef Field field
    cdef bint after_rest = False
    found[0] = Contents(0, 0, 0, 0, 0, NULL, NULL)
    while place < end:
        if not next_field(place, end, &field):
            return False
        if holds_ids(&field):
            if <size_t>(field.end - field.content) % sizeof(uint32_t):
                return False
            if found.id_spans == 0:
                found.first_ids = field.content
            found.ids += <size_t>(field.end - field.content)
            found.id_spans += 1
            after_rest = False
        else:
            if not after_rest:
                if found.rest_spans == 0:
                    found.first_rest = place
                found.rest_spans += 1
            found.rest += <size_t>(field.end - place)
            found.fields |= <uint64_t>1 << (field.tag >> 3 if field.tag >> 3 < 64 else 0)
            after_rest = True
        place = field.end
    return True


cdef void gather(
    Place place, Place end, unsigned char* ids, unsigned char* rest
) noexcept nogil:
    """Copies field 1 to `ids` and all else to `rest`, each if it is not NULL. `measure` went before."""
    cdef Field field
    cdef size_t size
    while place < end and next_field(place, end, &field):
        if holds_ids(&field):
            size = <size_t>(field.end - field.content)
            if ids != NULL:
                memcpy(ids, field.content, size)
                ids += size
        elif rest != NULL:
            size = <size_t>(field.end - place)
            memcpy(rest, place, size)
            rest += size
        place = field.end


cdef tuple split_span(bytes message, Place place, Place end):
    """Splits the request that lies in `message` from `place` to `end`."""
    cdef Contents found
    cdef bytes ids = message
    cdef bytes rest = b""
    cdef unsigned char* ids_copy = NULL
    cdef unsigned char* rest_copy = NULL
    if not measure(place, end, &found):
        return None
    if found.id_spans > 1:
        ids = PyBytes_FromStringAndSize(NULL, found.ids)
        found.first_ids = ids_copy = <unsigned char*>PyBytes_AS_STRING(ids)
    if found.rest_spans == 1:
        rest = PyBytes_FromStringAndSize(<const char*>found.first_rest, found.rest)
    elif found.rest_spans > 1:
        rest = PyBytes_FromStringAndSize(NULL, found.rest)
        rest_copy = <unsigned char*>PyBytes_AS_STRING(rest)
    if ids_copy != NULL or rest_copy != NULL:
        gather(place, end, ids_copy, rest_copy)
    return token_ids_in(ids, found.first_ids, <Py_ssize_t>(found.ids // sizeof(uint32_t))), rest, found.fields


def split(bytes message not None):
    """The token ids and all else of a request; see `request_wire.pyi`."""
    cdef Place start = <Place>PyBytes_AS_STRING(message)
    return split_span(message, start, start + PyBytes_GET_SIZE(message))


def split_batch(bytes message not None, size_t most):
    """The requests of a batch, each split; see `request_wire.pyi`."""
    cdef Place place = <Place>PyBytes_AS_STRING(message)
    cdef Place end = place + PyBytes_GET_SIZE(message)
    cdef list requests = []
    cdef size_t count = 0
    cdef Field field
    while place < end:
        if not next_field(place, end, &field):
            return None
        if field.tag == (1 << 3 | LEN):
            count += 1
            if count <= most:
                requests.append(split_span(message, field.content, field.end))
        place = field.end
    return requests, count
