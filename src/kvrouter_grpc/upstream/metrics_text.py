"""The few samples the router wants out of an engine's Prometheus page.

Own code because a page has thousands of samples of which three are wanted: the parser of prometheus_client
builds an object for each, takes hundreds of times as long, and would be a dependency for this alone.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

# name, optional {labels}, value; a timestamp may follow. Label values are quoted, so "}" may stand inside
# them.
_SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?[ \t]+(\S+)')
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_MAX_LINE_CHARS = 65536


class Sample(NamedTuple):
    """One line of the page."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(page: bytes, names: Collection[str]) -> Iterator[Sample]:
    """Yield the samples of the metrics called `names`, in the order of the page.

    Reads the text format 0.0.4 of Prometheus. Lines that are not of it are passed over: a page is never
    refused.
    """
    prefixes = tuple(name.encode() for name in names)
    for raw in page.split(b"\n"):
        if not raw.startswith(prefixes) or len(raw) > _MAX_LINE_CHARS:
            continue
        match = _SAMPLE.match(raw.decode("utf-8", "replace"))
        if match is None or match[1] not in names:  # another metric may begin with a wanted name
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        yield Sample(match[1], {label: _unescaped(text) for label, text in _LABEL.findall(match[2] or "")}, value)


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], text)
