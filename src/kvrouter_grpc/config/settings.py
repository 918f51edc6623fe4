"""Every setting with all its names: the one table behind flags, environment, YAML keys and docs."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kvrouter_grpc.config.model import Config
from kvrouter_grpc.config.pending import PendingRouterConfig, RetiredRouterConfig
from kvrouter_grpc.config.section import NAMES, Names, Section, Syntax
from kvrouter_grpc.config.worker import WorkerEntry

_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    Path: "a path",
}
_RELATIONS = ((Ge, "ge", "of at least"), (Gt, "gt", "above"), (Le, "le", "up to"), (Lt, "lt", "below"))
_SHOWN = 80  # characters of a bad value that a message repeats


def shown(value: Any) -> str:
    """A value as messages repeat it: printable and short."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def shown_name(name: str) -> str:
    """An unknown name as messages repeat it: as it is, unless a terminal would not print it so."""
    return name if name.isprintable() and len(name) <= _SHOWN else shown(name)


@dataclass(frozen=True)
class Setting:
    """One setting: where it belongs, what it is called, how its value is read.

    Attributes:
        section: "" at the top level and for the keys of a worker.
        name: The field's name.
        info: Type, default, bounds and help, as the model declares them.
        separator: What stands between the items of a list in one text.
    """

    section: str
    name: str
    info: FieldInfo
    separator: str = ","

    @property
    def path(self) -> str:
        """`section.name`, the key of this setting in `SETTINGS` and of its origin."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def key(self) -> str:
        """The path as people write it in YAML, with hyphens."""
        return self.path.replace("_", "-")

    @cached_property
    def names(self) -> Names:
        """Names beside the derived ones."""
        extra: Any = self.info.json_schema_extra
        names: Names = extra[NAMES]  # `setting` made the field
        return names

    @property
    def flag(self) -> str:
        """The command-line flag; those of the server have no prefix."""
        prefix = "" if self.section in {"", "server"} else f"{self.section}-"
        return self.names.flag or f"--{prefix}{self.name}".replace("_", "-")

    @property
    def env(self) -> tuple[str, ...]:
        """Environment variables, the deprecated ones left out."""
        own = f"KVROUTER_{self.path}".replace(".", "_").upper()
        contract = self.names.env
        if not contract and self._contract:
            contract = (f"DYN_ROUTER_{self.name.upper()}",)
        return (*contract, own)

    @property
    def legacy_flags(self) -> tuple[str, ...]:
        """Deprecated flags."""
        return (f"--{self.name}".replace("_", "-"),) if self._contract else ()

    @property
    def _contract(self) -> bool:
        return self.section == "router" and self.names.dynamo and not self.names.flag

    @property
    def pending(self) -> bool:
        """Whether this version gives it no effect."""
        return self.section == "router" and self.name in PendingRouterConfig.model_fields

    @property
    def retired(self) -> bool:
        """Whether it only stands for other settings."""
        return self.section == "router" and self.name in RetiredRouterConfig.model_fields

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.info.default is PydanticUndefined

    @property
    def default(self) -> Any:
        """Its default; meaningless where `required`."""
        return self.info.default

    @cached_property
    def _inner(self) -> tuple[Any, list[Any], bool]:
        """Its type without None, the constraints on it, and whether None is allowed."""
        kind, metadata, optional = self.info.annotation, list(self.info.metadata), False
        while True:
            arguments = get_args(kind)
            if get_origin(kind) is Annotated:
                kind, metadata = arguments[0], [*metadata, *arguments[1:]]
            elif get_origin(kind) in {Union, UnionType} and NoneType in arguments:
                (kind,) = (argument for argument in arguments if argument is not NoneType)
                optional = True
            else:
                return kind, metadata, optional

    @property
    def switch(self) -> bool:
        """Whether its flag is written without a value, and with `--no-` to turn it off."""
        return self._inner[0] is bool

    @property
    def repeated(self) -> bool:
        """Whether it holds a list and its flag may be given several times."""
        return get_origin(self._inner[0]) is tuple

    @property
    def optional(self) -> bool:
        """Whether it may be none."""
        return self._inner[2]

    @property
    def syntax(self) -> str:
        """What may be written, in words."""
        kind, metadata, optional = self._inner
        if get_origin(kind) is tuple:  # what is said is about one item
            kind = get_args(kind)[0]
            if get_origin(kind) is Annotated:
                kind, metadata = get_args(kind)[0], [*metadata, *get_args(kind)[1:]]
        words = next((str(item) for item in metadata if isinstance(item, Syntax)), "")
        if not words and get_origin(kind) is Literal:
            words = " or ".join(", ".join(get_args(kind)).rsplit(", ", 1))
        words = words or _PLAIN.get(kind, "a text")
        for relation, attribute, how in _RELATIONS:
            for item in metadata:
                if isinstance(item, relation):
                    words += f" {how} {getattr(item, attribute)}"
        words = re.sub(r"of at least (\S+) up to", r"from \1 to", words)
        return f"{words}, or none" if optional else words

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        kind: Any = self.info.annotation
        if self.info.metadata:
            kind = Annotated[(kind, *self.info.metadata)]
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))

    def parse_text(self, text: str) -> Any:
        """Read a value that was written as text, in a flag, the environment or an inline worker.

        Raises:
            ValueError: It is not usable; the message says what to write.
        """
        if self.optional and text.strip().lower() == "none":
            return None
        if self.repeated:
            return self.parse_items(text.split(self.separator))
        return self._checked(text, lambda: self._adapter.validate_strings(text))

    def parse_items(self, items: list[str]) -> Any:
        """Read a list of texts.

        Raises:
            ValueError: It is not usable; the message says what to write.
        """
        stripped = tuple(item.strip() for item in items)
        return self._checked(self.separator.join(items), lambda: self._adapter.validate_python(stripped))

    def parse_yaml(self, value: Any) -> Any:
        """Read a value of a YAML document; it has the right type already; a lone item may stand for a list.

        Raises:
            ValueError: It is not usable; the message says what to write.
        """
        if self.repeated and isinstance(value, str):
            value = [value]
        return self._checked(value, lambda: self._adapter.validate_json(json.dumps(value), strict=True))

    def _checked(self, value: Any, parse: Any) -> Any:
        try:
            return parse()
        except ValidationError as error:
            errors = error.errors(include_url=False)
            items = [each["input"] for each in errors if each["loc"]]
            if items:  # of a list: show the bad ones only
                value = items if len(items) > 1 else items[0]
            causes = {f" ({each['ctx']['error']})" for each in errors if each["type"] == "value_error"}
            detail = "".join(sorted(causes))
        except (TypeError, ValueError, RecursionError):  # JSON has no such value
            detail = ""
        raise ValueError(f"{shown(value)} is not usable; write {self.syntax}{detail}")


SECTIONS: Mapping[str, type[Section]] = {
    name: info.annotation
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}


def _settings() -> Iterator[Setting]:
    for name, info in Config.model_fields.items():
        if name not in SECTIONS and not info.exclude:
            yield Setting("", name, info, separator=";" if name in {"workers", "endpoint_policies"} else ",")
    for section, model in SECTIONS.items():
        own = [name for name in model.model_fields if name in model.__annotations__]
        for name in (*own, *(name for name in model.model_fields if name not in own)):
            yield Setting(section, name, model.model_fields[name])
    for name, info in RetiredRouterConfig.model_fields.items():
        yield Setting("router", name, info)


SETTINGS: Mapping[str, Setting] = {setting.path: setting for setting in _settings()}
WORKER_SETTINGS: Mapping[str, Setting] = {
    name: Setting("", name, info, separator="|") for name, info in WorkerEntry.model_fields.items()
}
