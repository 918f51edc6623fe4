"""The few samples the router wants out of an engine's Prometheus page.

Own code because a page has hundreds of samples of which a few are wanted, every other second from every engine: the
parser of prometheus_client builds an object for each. Here the page is searched for the names, and the rest of it is
never looked at.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

# name, optional {labels}, value; a timestamp may follow. Label values are quoted, so "}" may stand inside
# them.
_SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?[ \t]+(\S+)')
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_MAX_LINE_CHARS = 65536
_MAX_LINES = 4096  # of one metric: far more than an engine has ranks


class Sample(NamedTuple):
    """One line of the page."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(page: bytes, names: Collection[str]) -> Iterator[Sample]:
    """Yield the samples of the metrics called `names`: name by name, each in the order of the page.

    Reads the text format 0.0.4 of Prometheus. Lines that are not of it are passed over: a page is never
    refused.
    """
    page = b"\n" + page  # every line has one before it now
    for name in names:
        for line in islice(_lines(page, b"\n" + name.encode()), _MAX_LINES):
            match = _SAMPLE.match(line.decode("utf-8", "replace"))
            if match is None or match[1] != name:  # another metric may begin with a wanted name
                continue
            try:
                value = float(match[3])
            except ValueError:
                continue
            yield Sample(name, {label: _unescaped(text) for label, text in _LABEL.findall(match[2] or "")}, value)


def _lines(page: bytes, start: bytes) -> Iterator[bytes]:
    """The lines of a sane length that begin with `start`, which begins with the end of the line before."""
    at = page.find(start)
    while at >= 0:
        end = page.find(b"\n", at + 1)
        end = end if end >= 0 else len(page)
        if end - at <= _MAX_LINE_CHARS:
            yield page[at + 1 : end]
        at = page.find(start, end)


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], text)
