"""What a section of the configuration is made of: typed, bounded settings with their names and help."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MIB = 1 << 20
NAMES = "names"  # the key under which `setting` files its `Names`


@dataclass(frozen=True, slots=True)
class Names:
    """How a setting is called where its name does not follow from its section and field.

    Attributes:
        flag: The command-line flag, "" for the one derived from section and field.
        env: Environment variables accepted beside `KVROUTER_<SECTION>_<FIELD>`.
        legacy_env: Deprecated environment variables, accepted with a warning.
        dynamo: Whether a router setting is one of Dynamo's `--router-*` flags: unless the above name others,
            `DYN_ROUTER_<FIELD>` is read, too, and the flag without its prefix accepted, deprecated.
    """

    flag: str = ""
    env: tuple[str, ...] = ()
    legacy_env: tuple[str, ...] = ()
    dynamo: bool = True


def setting(default: Any, description: str, *, names: Names | None = None, **bounds: Any) -> Any:
    """Declare one setting of a section.

    Args:
        default: The value when no source gives one; `...` makes the setting required.
        description: What it does and when to change it, for `--help` and the reference page.
        names: Names beside the derived ones.
        **bounds: Constraints of `pydantic.Field` (`ge`, `gt`, `le`, `max_length`, ...).
    """
    extra: Any = {NAMES: names or Names()}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class Contradiction(NamedTuple):
    """Settings that are each valid but not together."""

    fields: tuple[str, ...]
    text: str  # one sentence: what is wrong and what to write


class Section(BaseModel):
    """A frozen group of settings; unknown names, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong between fields; each field has already been checked alone."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        found = [contradiction.text for contradiction in self.contradictions()]
        if found:
            raise PydanticCustomError("contradiction", "{text}", {"text": " ".join(found)})
        return self


_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})", re.ASCII)


def split_host_port(value: str) -> tuple[str, int]:
    """Split `host:port`; the brackets of an IPv6 host stay on.

    Raises:
        ValueError: It has another form, or the port is above 65535.
    """
    match = _HOST_PORT.fullmatch(value)
    if match is None or int(match["port"]) > 65535:
        raise ValueError("it needs a host and a port from 0 to 65535")
    return match["host"], int(match["port"])


def _host_port(value: str) -> str:
    split_host_port(value)
    return value


_ENDPOINT = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){2}")


def _endpoint(value: str) -> str:
    if _ENDPOINT.fullmatch(value) is None:
        raise ValueError("exactly three parts, each of letters, digits, '_' and '-'")
    return value


class Syntax(str):
    """Part of an annotation: the form of a value, as told to people ("host:port")."""

    __slots__ = ()


HostPort = Annotated[str, AfterValidator(_host_port), Syntax("host:port")]
Endpoint = Annotated[str, AfterValidator(_endpoint), Syntax("namespace.component.endpoint")]
