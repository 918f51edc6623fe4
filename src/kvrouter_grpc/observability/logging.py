"""Structured logs on stderr, for the router and the libraries under it alike.

`structlog.get_logger(__name__)` works anywhere, `configure_logging` decides once how it looks. What a client
sent is never written: values under the names of `CONTENT` show their size only.
"""

import logging
import sys
from array import array
from collections.abc import Sized
from contextlib import AbstractContextManager

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from kvrouter_grpc.config import LogConfig

CONTENT = frozenset({"completion", "messages", "prompt", "prompt_token_ids", "prompts", "text", "token_ids", "tokens"})
"""Keys whose values are what people wrote or what the model answered, whatever module logs them."""

MAX_TEXT = 4096
"""Characters of one value; a peer may choose how long an error message gets."""


def bound(request_id: str) -> AbstractContextManager[None]:
    """Put `request_id` on every line logged inside the `with` block, by any module, in this task."""
    return structlog.contextvars.bound_contextvars(request_id=request_id)


def hide_content(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what a client sent, and anything binary, by its size; shorten long texts."""
    for key, value in event.items():
        if key in CONTENT or isinstance(value, bytes | bytearray | memoryview | array):
            event[key] = f"<{len(value)} hidden>" if isinstance(value, Sized) else "<hidden>"
        elif isinstance(value, str) and len(value) > MAX_TEXT:
            event[key] = f"{value[:MAX_TEXT]}... ({len(value)} characters)"
    return event


def configure_logging(config: LogConfig) -> None:
    """Send all logs of this process to stderr, in one form. May be called again; the last call counts."""
    level = logging.getLevelNamesMapping()[config.level.upper()]
    as_json = config.format == "json" or (config.format == "auto" and not sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_json:
        rendering += [
            structlog.processors.format_exc_info,
            hide_content,
            structlog.processors.JSONRenderer(default=repr),
        ]
    else:
        # Not the default formatter: it shows local variables, and those hold prompts.
        console = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        rendering += [hide_content, console]

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=rendering))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)
    # A line per health check, or per file descriptor watched, is noise at any level of ours.
    for chatty in ("aiohttp.access", "asyncio"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
