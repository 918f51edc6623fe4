"""The HTTP connections to all engines."""

import aiohttp

# Below uvicorn's 5 s (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`): of two sides that close an idle connection, the one
# that sends requests must be the first, or a request meets a connection that is being closed and fails
# without need.
_KEEPALIVE_S = 3.0


def engine_session() -> aiohttp.ClientSession:
    """Open the session that the clients of all engines share; the caller closes it.

    It limits no connections (admission is the router's work), keeps no cookies, reads no proxy settings, and
    takes no compressed answers, so that what arrives is never larger than what was sent.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity", "User-Agent": "kvrouter"},
        auto_decompress=False,
        trust_env=False,
    )
