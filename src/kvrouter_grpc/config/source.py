"""What each source says: flags, environment and YAML, each value with its origin and not yet parsed."""

import difflib
import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvrouter_grpc.config.settings import SECTIONS, SETTINGS, Setting, shown_name

CONFIG_ENV = "KVROUTER_CONFIG"  # names the YAML file; read by the command line
MAX_FILE_BYTES = 4 << 20

FlagValue = str | bool | Iterable[str]

# Kubernetes gives a pod such variables for every Service of its namespace. For a Service called
# kvrouter-server they would else read like settings.
_SERVICE_LINK = re.compile(
    r".+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)=.*|.+_PORT=\w+://.*", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Given:
    """One value as it was written.

    Attributes:
        origin: For people: `flag --router-mode`, `environment DYN_ROUTER_MODE`, `router.yaml: router.mode`.
        text: Whether `value` is text still to be read, else it comes typed from YAML.
        deprecated: Whether it came under a name that will go.
    """

    setting: Setting
    value: Any
    origin: str
    text: bool = True
    deprecated: bool = False


@dataclass(slots=True)
class Source:
    """All that one source says, and what is wrong with how it says it."""

    given: list[Given] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: its nearest known one, if any is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def from_flags(flags: Mapping[str, FlagValue]) -> Source:
    """Take flags by the name they were written with; a negated switch is False under its positive name."""
    source = Source()
    known = {setting.flag: (setting, False) for setting in SETTINGS.values()}
    legacy = {flag: (setting, True) for setting in SETTINGS.values() for flag in setting.legacy_flags}
    for flag, value in flags.items():
        if flag not in known and flag not in legacy:
            source.faults.append(f"flag {shown_name(flag)} is unknown{did_you_mean(flag, known)}")
            continue
        setting, deprecated = known.get(flag) or legacy[flag]
        typed = flag.replace("--", "--no-", 1) if value is False else flag
        plain = value if isinstance(value, str | bool) else list(value)
        source.given.append(Given(setting, plain, f"flag {typed}", deprecated=deprecated))
    return source


def from_env(env: Mapping[str, str]) -> Source:
    """Take the environment variables that are settings; an empty one counts as unset."""
    source = Source()
    known = {name: (setting, False) for setting in SETTINGS.values() for name in setting.env}
    known |= {name: (setting, True) for setting in SETTINGS.values() for name in setting.names.legacy_env}
    sections = tuple(f"KVROUTER_{section.upper()}_" for section in SECTIONS)
    for name, value in env.items():
        if name in known:
            if value.strip():
                setting, deprecated = known[name]
                source.given.append(Given(setting, value, f"environment {name}", deprecated=deprecated))
        elif name == CONFIG_ENV or not name.startswith(("KVROUTER_", "DYN_ROUTER_")):
            continue
        elif not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            hint = did_you_mean(name, known)
            if hint or name.startswith(("DYN_ROUTER_", *sections)):
                source.faults.append(f"environment {shown_name(name)} is not a setting{hint}")
            else:
                source.warnings.append(f"environment {shown_name(name)} is not a setting: ignored.")
    return source


class _Loader(yaml.SafeLoader):
    """YAML without the two things that make a document say other than it seems: aliases and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: It cannot be read, is too large or is not YAML; the message starts with the path.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        return yaml.load(data, _Loader)  # noqa: S506 (_Loader is a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{where}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"{path}: not a YAML document") from None


def keys(mapping: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    """The items of a YAML mapping; `block-size` and `block_size` are the same key."""
    return ((str(key).replace("-", "_"), value) for key, value in mapping.items())


def from_yaml(path: Path) -> Source:
    """Take the settings of a YAML file: a mapping of sections, plus endpoints and workers."""
    source = Source()
    try:
        document = read_yaml(path)
    except ValueError as error:
        source.faults.append(str(error))
        return source
    if document is None:
        return source
    if not isinstance(document, dict):
        source.faults.append(f"{path}: not a mapping of sections such as server: and router:")
        return source
    entries: list[tuple[str, Any]] = []
    for section, content in keys(document):
        if section not in SECTIONS:
            entries.append((section, content))
        elif isinstance(content, dict):
            entries.extend((f"{section}.{name}", value) for name, value in keys(content))
        elif content is not None:
            source.faults.append(f"{path}: {section} is not a mapping of settings")
    for name, value in entries:
        setting = SETTINGS.get(name)
        if setting is None:
            hint = did_you_mean(name, [*SETTINGS, *SECTIONS]).replace("_", "-")
            source.faults.append(f"{path}: {shown_name(name.replace('_', '-'))} is not a setting{hint}")
        else:
            source.given.append(Given(setting, value, f"{path}: {setting.key}", text=False))
    return source
