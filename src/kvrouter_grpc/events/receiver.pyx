"""`Receiver`: reads a ZeroMQ socket empty, whole messages at a time; batches in order go on to the index at once.

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
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvrouter_grpc.core.kv_feed cimport Applied, KvFeed
from kvrouter_grpc.core.msgpack cimport Span, big_endian
from kvrouter_grpc.events.batch_log cimport SEQ_BITS, BatchLog

from kvrouter_grpc.core.kv_feed import BatchError

cdef enum:
    DONTWAIT = 1
    MOST_BATCHES = 64  # followed in one go
    MOST_BATCH_BYTES = 1 << 15  # after which none is added to a go: some 100 us of work, unless one alone is larger
    MOST_CHANGES = 1 << 16  # reports of the monitor: all there are, in practice
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


# One go at a time: all receivers share the space.
cdef Message[MOST_BATCHES] payloads
cdef uint64_t[MOST_BATCHES] seqs


@cython.final
@cython.freelist(4)
cdef class Delivery:
    """What one go found and did; described in `receiver.pyi`."""

    cdef readonly uint64_t batches
    cdef readonly uint64_t skipped
    cdef readonly uint64_t misshapen
    cdef readonly bint cleared
    cdef readonly str fault
    cdef readonly list left
    cdef readonly list changes


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
        cdef void* handle = self._handle()
        self.drained = False
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

    def deliver(self, Receiver monitor not None, BatchLog log not None, KvFeed feed not None, bint in_order):
        """Takes batches and applies those that are in order; see `receiver.pyi`."""
        cdef Delivery found = Delivery.__new__(Delivery)
        cdef Applied applied = Applied.__new__(Applied)
        cdef uint64_t count = 0
        cdef uint64_t i
        cdef Span payload
        found.fault = ""
        found.left = []
        try:
            self._collect(&count, &found.misshapen)
            # The monitor tells of a connection before its first message can be received, so what it says now is all
            # that there is to consider before these are used.
            found.changes = monitor.receive(MOST_CHANGES)
            if in_order and not found.changes:
                while found.batches < count and not found.fault:
                    payload = _span(&payloads[found.batches])
                    if not log.append(seqs[found.batches], payload.data, payload.size):
                        break
                    found.batches += 1
                    try:
                        feed.take(payload, applied)
                    except BatchError as error:
                        found.fault = str(error)
            for i in range(found.batches, count):
                payload = _span(&payloads[i])
                found.left.append((seqs[i], PyBytes_FromStringAndSize(<char*>payload.data, <Py_ssize_t>payload.size)))
        finally:
            for i in range(count):
                msg_close(&payloads[i])
        found.skipped = applied.skipped
        found.cleared = applied.cleared
        return found

    cdef int _collect(self, uint64_t* count, uint64_t* misshapen) except -1:
        # Fills `payloads` and `seqs`; what is not [topic, sequence number, payload] is counted and left out.
        cdef Message part
        cdef size_t taken = 0
        cdef void* handle = self._handle()
        self.drained = False
        msg_init(&part)
        try:
            while count[0] < MOST_BATCHES and taken < MOST_BATCH_BYTES and misshapen[0] < MOST_BATCHES:
                if not _receive_first(&part, handle):
                    self.drained = True
                    break
                msg_init(&payloads[count[0]])
                count[0] += 1
                if _receive_batch(&part, &payloads[count[0] - 1], handle, &seqs[count[0] - 1]):
                    taken += msg_size(&payloads[count[0] - 1])
                else:
                    count[0] -= 1
                    msg_close(&payloads[count[0]])
                    misshapen[0] += 1
        finally:
            msg_close(&part)
        return 0

    cdef void* _handle(self) except NULL:
        if self.socket.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        return <void*><uintptr_t>self.socket.underlying


cdef Span _span(Message* message) noexcept:
    cdef Span span
    span.data = <const uint8_t*>msg_data(message)
    span.size = msg_size(message)
    return span


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


cdef int _receive_more(Message* part, void* handle) except -1:
    # The next frame of a message: they arrive together.
    while msg_recv(part, handle, DONTWAIT) < 0:
        if last_errno() != EINTR:
            raise zmq.ZMQError(last_errno())
    return 0


cdef list _receive_rest(Message* part, void* handle, size_t* taken):
    # All frames of the message whose first one is here.
    cdef list frames = []
    while True:
        if len(frames) < MOST_FRAMES:
            frames.append(PyBytes_FromStringAndSize(<char*>msg_data(part), <Py_ssize_t>msg_size(part)))
            taken[0] += msg_size(part)
        if not msg_more(part):
            return frames
        _receive_more(part, handle)


cdef bint _receive_batch(Message* part, Message* payload, void* handle, uint64_t* seq) except? False:
    # The rest of the message whose first frame is here; whether it is a batch.
    cdef bint sound = False
    cdef uint32_t frames = 1
    cdef Message* last = part
    while msg_more(last):
        frames += 1
        if frames == 3:
            last = payload
        _receive_more(last, handle)
        if frames == 2 and msg_size(last) == sizeof(uint64_t):
            seq[0] = big_endian(<const uint8_t*>msg_data(last), sizeof(uint64_t))
            sound = not seq[0] >> SEQ_BITS
    return sound and frames == 3
