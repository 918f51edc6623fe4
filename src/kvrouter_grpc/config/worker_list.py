"""Lists of workers: inline texts, YAML entries and the workers file."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvrouter_grpc.config.settings import WORKER_SETTINGS, shown, shown_name
from kvrouter_grpc.config.source import did_you_mean, keys, read_yaml
from kvrouter_grpc.config.worker import WorkerEntry
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.types import WorkerSpec

MAX_WORKERS = 10_000


def parse_entry(pairs: Iterable[tuple[str, Any]], *, text: bool, origin: str) -> WorkerEntry:
    """Read one worker.

    Args:
        pairs: Keys (with underscores) and values.
        text: Whether the values are texts still to be read.
        origin: What faults start with.

    Raises:
        ConfigError: With every fault of this worker.
    """
    values: dict[str, Any] = {}
    faults = []
    for name, raw in pairs:
        setting = WORKER_SETTINGS.get(name)
        if setting is None:
            hint = did_you_mean(name, WORKER_SETTINGS).replace("_", "-")
            faults.append(f"{origin}: {shown_name(name.replace('_', '-'))} is not a key of a worker{hint}")
        elif name in values:
            faults.append(f"{origin}: {setting.key} is given twice")
        else:
            values[name] = None
            try:
                values[name] = setting.parse_text(raw) if text else setting.parse_yaml(raw)
            except ValueError as error:
                faults.append(f"{origin}: {setting.key} {error}")
    if "url" not in values:
        faults.append(f"{origin}: url is missing; write {WORKER_SETTINGS['url'].syntax}")
    if faults:
        raise ConfigError(faults)
    return WorkerEntry(**values)


def _parse_text(text: str, origin: str) -> WorkerEntry:
    pairs = []
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            raise ConfigError([f"{origin}: {shown(part)} is not key=value; write url=http://host:port,name=..."])
        pairs.append((key.strip().replace("-", "_"), value.strip()))
    return parse_entry(pairs, text=True, origin=origin)


def parse_entries(raw: Any, origin: str, *, text: bool) -> list[WorkerEntry]:
    """Read a list of workers: inline texts (`text`) or YAML mappings, which may be inline texts, too.

    Raises:
        ConfigError: With every fault of every worker.
    """
    if not isinstance(raw, list):
        raise ConfigError([f"{origin}: not a list of workers"])
    if len(raw) > MAX_WORKERS:
        raise ConfigError([f"{origin}: {len(raw)} workers are more than {MAX_WORKERS}"])
    entries, faults = [], []
    for number, item in enumerate(raw):
        here = f"{origin} {shown(item)}" if text else f"{origin}[{number}]"
        try:
            if isinstance(item, str):
                entries.append(_parse_text(item, here))
            elif isinstance(item, dict):
                entries.append(parse_entry(keys(item), text=False, origin=here))
            else:
                faults.append(f"{here}: not a mapping with url: and name:")
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return entries


def read_entries(path: Path) -> list[WorkerEntry]:
    """Read a workers file: a list of workers, or a mapping with that list under `workers`.

    Raises:
        ConfigError: With every fault in it.
    """
    try:
        document = read_yaml(path)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if isinstance(document, dict) and list(document) == ["workers"]:
        document = document["workers"]
    return [] if document is None else parse_entries(document, str(path), text=False)


def specs(entries: Iterable[WorkerEntry], endpoints: Sequence[str]) -> tuple[WorkerSpec, ...]:
    """Fill in the defaults of `entries` for a router that serves `endpoints`.

    Raises:
        ConfigError: Workers that name no endpoint where the router serves several.
    """
    default = endpoints[0] if len(endpoints) == 1 else None
    found, faults = [], []
    for entry in entries:
        try:
            found.append(entry.spec(default))
        except ValueError as error:
            faults.append(f"worker {entry.name or entry.url}: {error}")
    if faults:
        raise ConfigError(faults)
    return tuple(found)


def read_workers(path: Path, endpoints: Sequence[str]) -> tuple[WorkerSpec, ...]:
    """Read a workers file as the router uses it.

    Raises:
        ConfigError: With every fault in it.
    """
    return specs(read_entries(path), endpoints)
