"""Takes the token ids out of a request as it is on the wire, without an object per token.

A request that carries a prompt has its token ids in field 1, `repeated fixed32`: packed, that is an array of
little-endian u32, which is hashed where it lies. Everything else is left to protobuf's own parser.

The encoding: https://protobuf.dev/programming-guides/encoding/
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
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
    MAX_NAME = 256  # bytes of a model's name or of a request id in a plain request

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
    found[0] = Contents(0, 0, 0, 0, NULL, NULL)
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


cdef inline Place part(bytes message, Py_ssize_t start, Py_ssize_t stop, Place* end) except NULL:
    """Where the part of a message begins; `end` is where it ends."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(message)
    cdef Place place = <Place>PyBytes_AS_STRING(message)
    if stop < 0:
        stop = size
    if not 0 <= start <= stop <= size:
        raise ValueError(f"no part of a message of {size} bytes: {start} to {stop}")
    end[0] = place + stop
    return place + start


def split(bytes message not None, Py_ssize_t start=0, Py_ssize_t stop=-1):
    """The token ids and all else of a request; see `request_wire.pyi`."""
    cdef Contents found
    cdef Place end
    cdef Place place = part(message, start, stop, &end)
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
    return token_ids_in(ids, found.first_ids, <Py_ssize_t>(found.ids // sizeof(uint32_t))), rest


def entries(bytes message not None, size_t most):
    """Where the requests of a batch lie; see `request_wire.pyi`."""
    cdef Place start = <Place>PyBytes_AS_STRING(message)
    cdef Place place = start
    cdef Place end = start + PyBytes_GET_SIZE(message)
    cdef list spans = []
    cdef size_t count = 0
    cdef Field field
    while place < end:
        if not next_field(place, end, &field):
            return None
        if field.tag == (1 << 3 | LEN):
            count += 1
            if count <= most:
                spans.append((field.content - start, field.end - start))
        place = field.end
    return spans, count


# --- plain requests --------------------------------------------------------------------------------------------------


cdef enum:  # of a `BestWorkerIdRequest`
    TOKEN_IDS = 1
    ENDPOINT = 3
    MODEL = 4
    REQUEST_ID = 5
    PLAIN_FIELDS = 6  # their end


cdef inline bint find_plain(Place place, Place end, Field* found) noexcept nogil:
    """Finds the fields of a plain request; False when it has another one, or one of them twice."""
    cdef Field field
    cdef uint32_t number
    for number in range(<uint32_t>PLAIN_FIELDS):
        found[number].content = found[number].end = NULL
    while place < end:
        if not next_field(place, end, &field):
            return False
        number = field.tag >> 3
        if field.tag & 7 != LEN or number >= PLAIN_FIELDS or number == 2 or found[number].content != NULL:
            return False
        found[number] = field
        place = field.end
    return True


cdef inline bint is_request_id(const Field* field) noexcept nogil:
    """Whether a request can be called so: printable ASCII without spaces. One that is left out is right too."""
    cdef Place place = field.content
    if field.end - place > MAX_NAME:
        return False
    while place < field.end:
        if not 0x21 <= place[0] <= 0x7E:
            return False
        place += 1
    return True


cdef inline str text(const Field* field):
    if field.end == field.content:
        return ""
    return PyUnicode_DecodeUTF8(<const char*>field.content, field.end - field.content, NULL)


def read_plain(bytes message not None, Py_ssize_t most, uint32_t token_end, Py_ssize_t start=0, Py_ssize_t stop=-1):
    """What a plain request asks; see `request_wire.pyi`."""
    cdef Field found[PLAIN_FIELDS]
    cdef Field* ids = &found[TOKEN_IDS]
    cdef TokenIds tokens
    cdef Place end
    cdef Place place = part(message, start, stop, &end)
    if (
        not find_plain(place, end, found)
        or (ids.end - ids.content) % <Py_ssize_t>sizeof(uint32_t)
        or found[MODEL].end - found[MODEL].content > MAX_NAME
        or not is_request_id(&found[REQUEST_ID])
    ):
        return None
    tokens = token_ids_in(message, ids.content, (ids.end - ids.content) // <Py_ssize_t>sizeof(uint32_t))
    if not tokens.fit(most, token_end):
        return None
    try:
        return tokens, text(&found[ENDPOINT]), text(&found[MODEL]), text(&found[REQUEST_ID])
    except UnicodeDecodeError:
        return None
