"""Side: the least that a grpc.aio server can do: take the same messages, read nothing, answer a constant.

It has the options of the router's own server, so that the two differ in nothing but what they do with a call.
"""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from bench.side import serve
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.server.server import server_options

METHOD = "/kvrouter.v1.KvRouter/BestWorkerId"
servers: list[grpc.aio.Server] = []


async def open_server(reply_hex: str) -> str:
    """Serve `METHOD`, unary, and `METHOD + "Stream"`, bidirectional; returns the address."""
    reply = bytes.fromhex(reply_hex)

    async def unary(_request: bytes, _context: Any) -> bytes:
        return reply

    async def stream(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield reply

    service, _, method = METHOD[1:].partition("/")
    handlers: dict[str, Any] = {
        method: grpc.unary_unary_rpc_method_handler(unary),
        method + "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server(options=server_options(ServerConfig()))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    servers.append(server)
    return f"127.0.0.1:{port}"


if __name__ == "__main__":
    serve([open_server], uvloop.run)
