"""Writes replies as they go over the wire, without a message object: those of which there are very many.

What of a decision's reply depends on its target alone is written once, as its *head*; the rest is a few numbers behind it. Fields
are in the order of their numbers and left out when they are zero, as protobuf's own serializer does.

The encoding: https://protobuf.dev/programming-guides/encoding/
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:  # wire types
    VARINT = 0
    FIXED64 = 1
    LEN = 2

cdef enum:
    LONGEST_VARINT = 10
    MOST_BESIDE_CONTENT = 64  # bytes: of an answer, all but its token ids and its text
    MOST_BEHIND_HEAD = 160  # bytes: 4 + 3 varints, each with its tag, in two messages, 5 more and 2 doubles


cdef inline unsigned char* put_varint(unsigned char* out, uint64_t value) noexcept nogil:
    while value >= 0x80:
        out[0] = <unsigned char>(value | 0x80)
        out += 1
        value >>= 7
    out[0] = <unsigned char>value
    return out + 1


cdef inline unsigned char* put_number(unsigned char* out, uint32_t field, uint64_t value) noexcept nogil:
    """A uint32 or uint64 field."""
    if value == 0:
        return out
    return put_varint(put_varint(out, field << 3 | VARINT), value)


cdef inline unsigned char* put_double(unsigned char* out, uint32_t field, double value) noexcept nogil:
    cdef uint64_t bits
    memcpy(&bits, &value, sizeof(bits))
    if bits == 0:  # not so -0.0
        return out
    out = put_varint(out, field << 3 | FIXED64)
    memcpy(out, &bits, sizeof(bits))
    return out + sizeof(bits)


cdef inline unsigned char* put_message(
    unsigned char* out, uint32_t field, uint64_t* numbers, uint32_t count
) noexcept nogil:
    """A message whose fields 1 to `count` are numbers; it is there even when all of them are 0."""
    cdef unsigned char* size
    cdef uint32_t number
    out = put_varint(out, field << 3 | LEN)
    size = out
    out += 1  # at most 4 * 11 bytes follow
    for number in range(count):
        out = put_number(out, number + 1, numbers[number])
    size[0] = <unsigned char>(out - size - 1)
    return out


def delimited(uint32_t field, bytes content not None):
    """A field that holds a message or a text."""
    cdef unsigned char head[2 * LONGEST_VARINT]
    cdef Py_ssize_t size = PyBytes_GET_SIZE(content)
    cdef Py_ssize_t before = put_varint(put_varint(head, field << 3 | LEN), <uint64_t>size) - head
    cdef bytes whole = PyBytes_FromStringAndSize(NULL, before + size)
    cdef char* out = PyBytes_AS_STRING(whole)
    memcpy(out, head, before)
    memcpy(out + before, PyBytes_AS_STRING(content), size)
    return whole


def best_worker_head(uint64_t worker_id, uint32_t dp_rank, str worker_name not None, str url not None):
    """The fields that name a target; see `reply_wire.pyi`."""
    cdef unsigned char numbers[4 * LONGEST_VARINT]
    cdef unsigned char* out = numbers
    if worker_id:
        out = put_varint(out, 1 << 3 | FIXED64)
        memcpy(out, &worker_id, sizeof(worker_id))
        out += sizeof(worker_id)
    out = put_number(out, 2, dp_rank)
    return (
        PyBytes_FromStringAndSize(<const char*>numbers, out - numbers)
        + (delimited(3, worker_name.encode()) if worker_name else b"")
        + (delimited(4, url.encode()) if url else b"")
    )


def best_worker_reply(bytes head not None, choice, load, uint32_t prompt_tokens, uint32_t block_size):
    """The serialized reply; see `reply_wire.pyi`."""
    cdef uint64_t[4] overlap
    cdef uint64_t[3] booked
    cdef uint32_t cached = choice.cached_tokens if block_size else 0
    cdef Py_ssize_t size = PyBytes_GET_SIZE(head)
    cdef unsigned char behind[MOST_BEHIND_HEAD]
    cdef unsigned char* out = behind
    overlap[0], overlap[1], overlap[2], overlap[3] = choice.tiers
    booked[0], booked[1], booked[2] = load
    out = put_message(out, 5, overlap, 4)
    out = put_number(out, 6, overlap[0] + overlap[1] + overlap[2] + overlap[3])
    out = put_number(out, 7, cached)
    out = put_number(out, 8, prompt_tokens)
    out = put_number(out, 9, block_size)
    out = put_double(out, 10, choice.cost)
    out = put_double(out, 11, choice.freshness)
    out = put_message(out, 12, booked, 3)
    reply = PyBytes_FromStringAndSize(NULL, size + (out - behind))
    memcpy(PyBytes_AS_STRING(reply), PyBytes_AS_STRING(head), size)
    memcpy(PyBytes_AS_STRING(reply) + size, behind, out - behind)
    return reply


def answer_reply(chunk):
    """A lone chunk of an answer as a GenerateResponse; see `reply_wire.pyi`."""
    cdef list tokens
    cdef Py_ssize_t count
    cdef Py_ssize_t size
    cdef const char* content
    cdef unsigned char* start
    cdef unsigned char* out
    cdef unsigned char* length
    cdef uint32_t number
    if (
        chunk.finish_reason is not None
        or chunk.stop_reason is not None
        or chunk.logprobs
        or chunk.top_logprobs
        or chunk.kv_transfer_params is not None
        or chunk.prompt_logprobs is not None
    ):
        return None
    tokens = list(chunk.token_ids)
    count = len(tokens)
    text = chunk.text
    content = PyUnicode_AsUTF8AndSize(text, &size)
    whole = PyBytes_FromStringAndSize(NULL, MOST_BESIDE_CONTENT + count * <Py_ssize_t>sizeof(uint32_t) + size)
    start = out = <unsigned char*>PyBytes_AS_STRING(whole)
    if count:
        out = put_varint(put_varint(out, 1 << 3 | LEN), <uint64_t>count * sizeof(uint32_t))
        for token in tokens:
            number = token
            memcpy(out, &number, sizeof(number))
            out += sizeof(number)
    if size:
        out = put_varint(put_varint(out, 2 << 3 | LEN), <uint64_t>size)
        memcpy(out, content, size)
        out += size
    out = put_number(out, 3, chunk.index)
    usage = chunk.usage
    if usage is not None:
        prompt_tokens, completion_tokens, cached_tokens = usage
        out = put_varint(out, 10 << 3 | LEN)
        length = out
        out = put_number(put_number(out + 1, 1, prompt_tokens), 2, completion_tokens)
        if cached_tokens is not None:  # 0 says something too
            out = put_varint(put_varint(out, 3 << 3 | VARINT), cached_tokens)
        length[0] = <unsigned char>(out - length - 1)
    return PyBytes_FromStringAndSize(<const char*>start, out - start)
