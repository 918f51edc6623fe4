"""Snapshots from another router, over its KvRouterAdmin service."""

import asyncio

import grpc.aio

from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc
from kvrouter_grpc.snapshots.disk import MOST_BYTES

FIRST_PIECE_S = 5.0
"""Longest wait for the beginning: a peer that is not there must not hold up the start."""

TOTAL_S = 60.0
"""Longest wait for all of it."""


async def fetch(address: str, endpoint: str) -> bytes:
    """The snapshot of an endpoint, as the router at `address` (host:port) has it.

    Raises:
        OSError: It cannot be had; the text says why.
    """
    data = bytearray()
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = admin_pb2_grpc.KvRouterAdminStub(channel)
        call = stub.StreamSnapshot(admin_pb2.StreamSnapshotRequest(endpoint=endpoint), timeout=TOTAL_S)
        try:
            async with asyncio.timeout(FIRST_PIECE_S) as patience:
                async for piece in call:
                    patience.reschedule(None)
                    data += piece.data
                    if len(data) > MOST_BYTES:
                        raise OSError("it sends more than any snapshot is")
        except TimeoutError:
            raise OSError(f"it did not answer within {FIRST_PIECE_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise OSError(f"it answered {error.code().name}") from None
        finally:
            call.cancel()
    return bytes(data)
