"""Lists of endpoint policies: inline texts and YAML mappings."""

from collections.abc import Iterable
from typing import Any

from kvrouter_grpc.config.policy import OF_THE_PROCESS, EndpointPolicy
from kvrouter_grpc.config.settings import SETTINGS, Setting, shown, shown_name
from kvrouter_grpc.config.source import did_you_mean, keys
from kvrouter_grpc.errors import ConfigError

_KEYS: dict[str, Setting] = {
    setting.name: setting
    for setting in SETTINGS.values()
    if setting.section == "router" and not (setting.pending or setting.retired) and setting.name not in OF_THE_PROCESS
}


_ALL = ", ".join(sorted(name.replace("_", "-") for name in OF_THE_PROCESS))


def _parse_entry(pairs: Iterable[tuple[str, Any]], *, text: bool, origin: str) -> EndpointPolicy:
    """Read one policy. Raises ConfigError with every fault of it."""
    endpoint, values, faults = "", dict[str, Any](), []
    for name, raw in pairs:
        setting = _KEYS.get(name)
        try:
            if name == "endpoint":
                (endpoint,) = SETTINGS["endpoints"].parse_items([str(raw)])
            elif setting is None:
                hint = did_you_mean(name, _KEYS).replace("_", "-")
                faults.append(
                    f"{origin}: {shown_name(name.replace('_', '-'))} is not a setting of one endpoint: those of the "
                    f"section router are, but for {_ALL}{hint}"
                )
            elif name in values:
                faults.append(f"{origin}: {name.replace('_', '-')} is given twice")
            else:
                values[name] = setting.parse_text(raw) if text else setting.parse_yaml(raw)
        except ValueError as error:
            faults.append(f"{origin}: {name.replace('_', '-')} {error}")
    if not endpoint and not faults:
        faults.append(f"{origin}: endpoint is missing; write endpoint=namespace.component.endpoint")
    if faults:
        raise ConfigError(faults)
    return EndpointPolicy(endpoint, values)


def _parse_text(text: str, origin: str) -> EndpointPolicy:
    pairs = []
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            raise ConfigError(
                [f"{origin}: {shown(part)} is not key=value; write endpoint=...,track-active-blocks=false"]
            )
        pairs.append((key.strip().replace("-", "_"), value.strip()))
    return _parse_entry(pairs, text=True, origin=origin)


def parse_policies(raw: Any, origin: str, *, text: bool) -> tuple[EndpointPolicy, ...]:
    """Read a list of policies: inline texts (`text`) or YAML mappings, which may be inline texts, too.

    Raises:
        ConfigError: With every fault of every policy.
    """
    if not isinstance(raw, list):
        raise ConfigError([f"{origin}: not a list of mappings with endpoint: and settings of router"])
    policies, faults = [], []
    for number, item in enumerate(raw):
        here = f"{origin} {shown(item)}" if text else f"{origin}[{number}]"
        try:
            if isinstance(item, str):
                policies.append(_parse_text(item, here))
            elif isinstance(item, dict):
                policies.append(_parse_entry(keys(item), text=False, origin=here))
            else:
                faults.append(f"{here}: not a mapping with endpoint: and settings of router")
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return tuple(policies)
