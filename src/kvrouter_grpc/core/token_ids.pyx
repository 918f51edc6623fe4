"""`TokenIds`: the token ids of a prompt where they lie in a message, and what is done with all of them at once."""

import sys

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_WRITABLE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

if sys.byteorder != "little":
    raise ImportError("kvrouter_grpc.core needs a little-endian machine")

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    /* Whether any of `count` ids is `end` or more; `end` is at most 2^31. GCC turns the loops into vector code only when
       asked to, and has to be given comparisons that SSE2 has: signed ones. */
    #if defined(__GNUC__) && !defined(__clang__)
    __attribute__((optimize("O3")))
    #endif
    static int kvrouter_any_at_least(const unsigned char* data, size_t count, uint32_t end) {
        uint32_t bits = 0, above = 0;
        if ((end & (end - 1)) == 0) {  /* a power of two, as without a vocabulary size: the bits tell */
            for (size_t i = 0; i < count; i++) {
                uint32_t token;
                memcpy(&token, data + 4 * i, 4);
                bits |= token;
            }
            return count != 0 && bits >= end;
        }
        for (size_t i = 0; i < count; i++) {
            int32_t token;
            memcpy(&token, data + 4 * i, 4);
            bits |= (uint32_t)token;
            above |= (uint32_t)(token >= (int32_t)end);
        }
        return above != 0 || bits > INT32_MAX;
    }

    /* Writes a number in decimal; returns the end. Two digits at a time: half the divisions. */
    static inline unsigned char* kvrouter_decimal(unsigned char* out, uint32_t value) {
        static const char pairs[201] =
            "00010203040506070809101112131415161718192021222324252627282930313233343536373839404142434445464748495051"
            "525354555657585960616263646566676869707172737475767778798081828384858687888990919293949596979899";
        int size = value < 100000
            ? value < 100 ? (value < 10 ? 1 : 2) : value < 1000 ? 3 : value < 10000 ? 4 : 5
            : value < 10000000 ? (value < 1000000 ? 6 : 7) : value < 100000000 ? 8 : value < 1000000000 ? 9 : 10;
        unsigned char* place = out + size;
        while (value >= 100) {
            place -= 2;
            memcpy(place, pairs + 2 * (value % 100), 2);
            value /= 100;
        }
        if (value >= 10)
            memcpy(out, pairs + 2 * value, 2);
        else
            out[0] = (unsigned char)('0' + value);
        return out + size;
    }
    """
    int any_at_least "kvrouter_any_at_least"(const unsigned char* data, size_t count, uint32_t end) noexcept nogil
    unsigned char* decimal "kvrouter_decimal"(unsigned char* out, uint32_t value) noexcept nogil

cdef enum:
    MOST_DIGITS = 10  # of a u32


@cython.final
cdef class TokenIds:
    """Token ids of a prompt; see `token_ids.pyi`."""

    def __cinit__(self):
        self.stride = sizeof(uint32_t)

    def __init__(self, tokens=b""):
        # Ids that lie in a message are made without it: see `token_ids_in`.
        cdef const unsigned char[::1] data = memoryview(tokens).cast("B")
        if self.owner is not None:
            raise TypeError("token ids cannot be changed")
        if data.shape[0] % sizeof(uint32_t):
            raise ValueError(f"tokens: {data.shape[0]} bytes are no array of u32")
        self.owner = bytes(data)
        self.data = <const unsigned char*>PyBytes_AS_STRING(self.owner)
        self.count = data.shape[0] // <Py_ssize_t>sizeof(uint32_t)

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"<{self.count} token ids>"

    def __getbuffer__(self, Py_buffer* view, int flags):
        if flags & PyBUF_WRITABLE == PyBUF_WRITABLE:
            raise BufferError("token ids cannot be changed")
        view.buf = <void*>self.data
        view.obj = self
        view.len = self.count * self.stride
        view.readonly = 1
        view.itemsize = self.stride
        view.format = NULL
        if flags & PyBUF_FORMAT:
            view.format = b"I"
        view.ndim = 1
        view.shape = &self.count
        view.strides = &self.stride
        view.suboffsets = NULL
        view.internal = NULL

    cpdef bint fit(self, Py_ssize_t most, uint32_t end) noexcept:
        """Whether there are 1 to `most` ids, all below `end`, which is at most 2**31."""
        return 0 < self.count <= most and not any_at_least(self.data, <size_t>self.count, end)

    def first_at_least(self, uint32_t end):
        """The position of the first id that is `end` or more, or -1."""
        cdef Py_ssize_t i
        cdef uint32_t token
        if any_at_least(self.data, <size_t>self.count, end):
            for i in range(self.count):
                memcpy(&token, self.data + i * self.stride, sizeof(token))
                if token >= end:
                    return i
        return -1

    def tobytes(self):
        """The ids as little-endian u32."""
        return PyBytes_FromStringAndSize(<const char*>self.data, self.count * self.stride)

    def tolist(self):
        """The ids as a list."""
        cdef list ids = PyList_New(self.count)
        cdef Py_ssize_t i
        cdef uint32_t token
        for i in range(self.count):
            memcpy(&token, self.data + i * self.stride, sizeof(token))
            value = <object>token
            Py_INCREF(value)
            PyList_SET_ITEM(ids, i, value)
        return ids


cdef TokenIds token_ids_in(bytes owner, const unsigned char* data, Py_ssize_t count):
    """The `count` ids at `data`, a place in `owner`."""
    cdef TokenIds found = TokenIds.__new__(TokenIds)
    found.owner = owner
    found.data = data
    found.count = count
    return found


def json_array(const uint32_t[::1] tokens not None):
    """The ids as a JSON array; see `token_ids.pyi`."""
    cdef size_t count = <size_t>tokens.shape[0]
    cdef const unsigned char* data = <const unsigned char*>&tokens[0] if count else NULL
    cdef bytes text = PyBytes_FromStringAndSize(NULL, 2 + count * (MOST_DIGITS + 1))
    cdef unsigned char* start = <unsigned char*>PyBytes_AS_STRING(text)
    cdef unsigned char* out = start
    cdef uint32_t token
    cdef size_t i
    out[0] = c"["
    out += 1
    for i in range(count):
        memcpy(&token, data + i * sizeof(token), sizeof(token))
        out = decimal(out, token)
        out[0] = c","
        out += 1
    if count:
        out -= 1
    out[0] = c"]"
    return PyBytes_FromStringAndSize(<const char*>start, out + 1 - start)
