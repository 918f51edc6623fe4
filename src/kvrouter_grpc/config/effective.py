"""The configuration as it took effect, as YAML that reads back into the same `Config`."""

from collections.abc import Iterator
from typing import Any

import yaml

from kvrouter_grpc.config.model import Config
from kvrouter_grpc.config.settings import SETTINGS
from kvrouter_grpc.config.worker import WorkerEntry


def _scalar(value: Any) -> str:
    """One value in YAML's flow style, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n...\n").strip()


def _lines(config: Config) -> Iterator[str]:
    section = ""
    plain = config.model_dump(mode="json", exclude={"workers", "endpoint_policies"})
    for setting in SETTINGS.values():
        if setting.retired:
            continue
        if setting.section and setting.section != section:
            section = setting.section
            yield f"{section}:"
        origin = config.origins.get(setting.path, "default")
        indent, key = ("  " if setting.section else ""), setting.name.replace("_", "-")
        if setting.path == "workers":
            yield f"workers:{'' if config.workers else ' []'}  # {config.origins.get('workers', origin)}"
            for spec in config.workers:
                entry = WorkerEntry.of(spec).model_dump(mode="json", exclude_none=True)
                yield f"  - {_scalar({name.replace('_', '-'): value for name, value in entry.items()})}"
        elif setting.path == "endpoint_policies":
            yield f"{key}:{'' if config.endpoint_policies else ' []'}  # {origin}"
            for policy in config.endpoint_policies:
                own = config.router_of(policy.endpoint).model_dump(mode="json", include=set(policy.settings))
                entry = {"endpoint": policy.endpoint} | {name.replace("_", "-"): value for name, value in own.items()}
                yield f"  - {_scalar(entry)}"
        else:
            holder = plain[setting.section] if setting.section else plain
            yield f"{indent}{key}: {_scalar(holder[setting.name])}  # {origin}"


def effective(config: Config) -> str:
    """Every setting with its value, and as a comment where the value came from.

    Workers of the workers file stand in the list like any other, so `workers-file` itself is shown as none.
    """
    merged = config.model_copy(update={"workers_file": None})
    return "\n".join(_lines(merged)) + "\n"
