"""One worker as people write it: inline (`name=a,url=http://...`) or as a mapping in YAML."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

from kvrouter_grpc.config.section import Endpoint, Section, Syntax, setting, split_host_port
from kvrouter_grpc.types import Role, WorkerSpec

_NAME = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:\[\]/-]{0,252}")
_MAX_LABEL = 256


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = not (parts.query or parts.fragment or parts.username or parts.password) and parts.path in {
        "",
        "/",
    }
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0 or not plain:
        raise ValueError("http or https, a host and a port, and no path")
    return f"{parts.scheme}://{parts.netloc}"


def _tcp(value: str) -> str:
    scheme, separator, address = value.partition("://")
    try:
        host, port = split_host_port(address)
    except ValueError:
        host, port = "", 0
    if scheme != "tcp" or not separator or not port or host in {"", "*"}:
        raise ValueError("tcp, a port, and a host that the router can reach")
    return value


def _name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        raise ValueError("1 to 253 letters, digits and . _ : / - [ ], a letter or digit first")
    return value


def _label(value: str) -> str:
    if not value or len(value) > _MAX_LABEL or not value.isprintable() or value != value.strip():
        raise ValueError(f"1 to {_MAX_LABEL} printable characters")
    return value


Url = Annotated[str, AfterValidator(_url), Syntax("http://host:port")]
TcpAddress = Annotated[str, AfterValidator(_tcp), Syntax("tcp://host:port")]
Label = Annotated[str, AfterValidator(_label), Syntax("a printable text")]


class WorkerEntry(Section):
    """The settings of one worker. What is left out, the router asks the worker for.

    Inline, `key=value` pairs stand between commas and `|` separates the items of a list.
    """

    url: Url = setting(..., "http://host:port of the engine's OpenAI-compatible server.")
    name: Annotated[str, AfterValidator(_name)] | None = setting(
        None,
        "Unique and stable, for example the pod's name: worker ids derive from it. Default: host:port of the url.",
    )
    endpoint: Endpoint | None = setting(
        None,
        "namespace.component.endpoint it serves. Default: the router's endpoint, when there is one only.",
    )
    model: tuple[Label, ...] | None = setting(
        None, "Names of the models and LoRA adapters it serves.", min_length=1, max_length=1024
    )
    events: TcpAddress | None = setting(
        None, "tcp://host:port of its KV event publisher; data-parallel rank r is at port + r."
    )
    replay: TcpAddress | None = setting(
        None, "tcp://host:port of its replay socket; data-parallel rank r is at port + r."
    )
    kv_events: bool = setting(True, "Off for a worker that publishes no KV events.")
    topic: str = setting("", "ZeroMQ topic of its events.", max_length=_MAX_LABEL)
    dp: int | None = setting(None, "Number of data-parallel ranks.", ge=1, le=1024)
    role: Literal["both", "prefill", "decode"] = setting("both", "Its part in disaggregated serving.")
    block_size: int | None = setting(None, "Tokens per KV block.", ge=1, le=65_536)
    taints: tuple[Label, ...] = setting((), "Marks that requests may require or prefer.", max_length=64)
    total_kv_blocks: int | None = setting(None, "KV blocks per rank.", ge=1, le=2**40)
    max_num_batched_tokens: int | None = setting(None, "The engine's token budget per step.", ge=1, le=2**31)

    def spec(self, default_endpoint: str | None) -> WorkerSpec:
        """The worker with its defaults filled in.

        Args:
            default_endpoint: Endpoint of a worker that names none, or None where it must name one.

        Raises:
            ValueError: It names no endpoint and there is no default.
        """
        endpoint = self.endpoint or default_endpoint
        if endpoint is None:
            raise ValueError("the router serves several endpoints: say which with endpoint=")
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return WorkerSpec(
            name=self.name or f"{host}:{port}",
            url=self.url,
            endpoint=endpoint,
            models=self.model,
            events=self.events,
            replay=self.replay,
            kv_events=self.kv_events,
            topic=self.topic,
            dp_size=self.dp,
            block_size=self.block_size,
            role=Role(self.role),
            taints=frozenset(self.taints),
            total_kv_blocks=self.total_kv_blocks,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )

    @classmethod
    def of(cls, spec: WorkerSpec) -> "WorkerEntry":
        """The entry that gives `spec` back."""
        values: dict[str, Any] = {
            "url": spec.url,
            "name": spec.name,
            "endpoint": spec.endpoint,
            "model": spec.models,
            "events": spec.events,
            "replay": spec.replay,
            "kv_events": spec.kv_events,
            "topic": spec.topic,
            "dp": spec.dp_size,
            "role": spec.role.value,
            "block_size": spec.block_size,
            "taints": tuple(sorted(spec.taints)),
            "total_kv_blocks": spec.total_kv_blocks,
            "max_num_batched_tokens": spec.max_num_batched_tokens,
        }
        return cls(**values)
