"""`Receiver`: reads a ZeroMQ socket empty, whole messages at a time.

pyzmq takes three calls, four option look-ups and, at the end, an exception for a message of three frames: several times
what libzmq itself does. So libzmq is called directly, at the addresses where pyzmq has loaded it. Its message type is
opaque, 64 bytes, and has been so since 4.1; see zmq_msg_recv(3).
"""

import ctypes

import zmq
import zmq.backend.cython._zmq as loaded

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport uint64_t, uintptr_t

cdef enum:
    DONTWAIT = 1
    MOST_FRAMES = 8  # of one message; the messages that are wanted have at most four
    MOST_BYTES = 1 << 20  # after which no further message is taken in one go

cdef struct Message:
    uint64_t[8] opaque

ctypedef int (*to_int)(Message*) noexcept
ctypedef int (*receive_part)(Message*, void*, int) noexcept
ctypedef void* (*to_data)(Message*) noexcept
ctypedef size_t (*to_size)(Message*) noexcept
ctypedef int (*get_errno)() noexcept


cdef uintptr_t _address(str name) except 0:
    try:
        return ctypes.cast(getattr(ctypes.CDLL(loaded.__file__), name), ctypes.c_void_p).value
    except AttributeError as error:
        raise ImportError(f"pyzmq is linked in a way that hides {name}: install a wheel of pyzmq from PyPI") from error


cdef to_int msg_init = <to_int>_address("zmq_msg_init")
cdef to_int msg_close = <to_int>_address("zmq_msg_close")
cdef to_int msg_more = <to_int>_address("zmq_msg_more")
cdef to_data msg_data = <to_data>_address("zmq_msg_data")
cdef to_size msg_size = <to_size>_address("zmq_msg_size")
cdef receive_part msg_recv = <receive_part>_address("zmq_msg_recv")
cdef get_errno last_errno = <get_errno>_address("zmq_errno")


@cython.final
cdef class Receiver:
    """Reads one socket; described in `receiver.pyi`."""

    cdef readonly object socket
    cdef readonly bint drained

    def __cinit__(self, socket):
        self.socket = socket

    def receive(self, size_t limit):
        """Up to `limit` messages."""
        cdef list messages = []
        cdef Message part
        cdef size_t taken = 0
        cdef void* handle
        self.drained = False
        if self.socket.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        handle = <void*><uintptr_t>self.socket.underlying
        msg_init(&part)
        try:
            while limit != 0 and taken < MOST_BYTES:
                if not _receive_first(&part, handle):
                    self.drained = True
                    break
                messages.append(_receive_rest(&part, handle, &taken))
                limit -= 1
        finally:
            msg_close(&part)
        return messages


cdef bint _receive_first(Message* part, void* handle) except? False:
    # False: there is no message.
    cdef int error
    while msg_recv(part, handle, DONTWAIT) < 0:
        error = last_errno()
        if error == EAGAIN:
            return False
        if error != EINTR:
            raise zmq.ZMQError(error)
    return True


cdef list _receive_rest(Message* part, void* handle, size_t* taken):
    # All frames of the message whose first one is here: they arrive together.
    cdef list frames = []
    while True:
        if len(frames) < MOST_FRAMES:
            frames.append(PyBytes_FromStringAndSize(<char*>msg_data(part), <Py_ssize_t>msg_size(part)))
            taken[0] += msg_size(part)
        if not msg_more(part):
            return frames
        while msg_recv(part, handle, DONTWAIT) < 0:
            if last_errno() != EINTR:
                raise zmq.ZMQError(last_errno())
