"""From what the sources say to one `Config`: precedence, parsing, old names, and every fault at once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvrouter_grpc.config.model import Config
from kvrouter_grpc.config.policy_list import parse_policies
from kvrouter_grpc.config.router import RouterConfig
from kvrouter_grpc.config.section import Section
from kvrouter_grpc.config.settings import SECTIONS, SETTINGS
from kvrouter_grpc.config.source import FlagValue, Given, Source, from_env, from_flags, from_yaml
from kvrouter_grpc.config.worker_list import parse_entries, read_entries, specs
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.types import WorkerSpec

_WEIGHT = "router.kv_overlap_score_weight"
_CREDIT = "router.kv_overlap_score_credit"
_SCALE = "router.prefill_load_scale"
_LOAD_AWARE = "router.load_aware"
_LOAD_AWARE_SETS = {
    _CREDIT: 0.0,
    "router.kv_events": False,
    "router.assume_kv_reuse": False,
    "router.track_active_blocks": True,
    "router.track_prefill_tokens": True,
}


def load(flags: Mapping[str, FlagValue], env: Mapping[str, str], file: Path | None = None) -> Config:
    """Read the configuration: flags before environment before YAML before defaults.

    Args:
        flags: Values by the flag as written, `{"--router-temperature": "0.5"}`: a text, a list of texts for a
            flag that repeats, a bool for a switch (False: its `--no-` form).
        env: The environment; variables of other programs are passed over.
        file: YAML file with the sections as mappings, or None.

    Raises:
        ConfigError: It lists every fault with its origin and what to write instead.
    """
    draft = _Draft()
    draft.take(from_flags(flags))
    draft.take(from_env(env))
    if file is not None:
        draft.take(from_yaml(file))
    draft.translate_weight()
    draft.apply_load_aware()
    return draft.config()


class _Draft:
    """A configuration in the making.

    Attributes:
        values: Parsed values by path; absent means default.
        origins: Where each of them came from.
        bad: Paths that were given something unusable, so that no second fault is derived from their defaults.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.bad: set[str] = set()
        self.faults: list[str] = []
        self.warnings: list[str] = []

    def take(self, source: Source) -> None:
        """Parse all that `source` says, and keep what no earlier source said."""
        self.faults += source.faults
        self.warnings += source.warnings
        said: dict[str, tuple[Any, str]] = {}
        for given in source.given:
            path = given.setting.path
            if given.deprecated and not given.setting.retired:
                better = given.setting.flag if given.origin.startswith("flag") else given.setting.env[0]
                self.warnings.append(f"{given.origin} is deprecated: write {better}.")
            try:
                value = _parse(given)
            except ConfigError as error:
                self.faults += error.faults
                self.bad.add(path)
                continue
            before = said.setdefault(path, (value, given.origin))
            if before[0] != value:
                self.faults.append(f"{before[1]} and {given.origin} differ: keep one")
        for path, (value, origin) in said.items():
            if path not in self.values:
                self.values[path], self.origins[path] = value, origin

    def translate_weight(self) -> None:
        """Turn the retired overlap weight into what replaced it, as the Dynamo router does."""
        weight, origin = self.values.pop(_WEIGHT, None), self.origins.pop(_WEIGHT, "")
        if weight is None:
            return
        becomes = {_SCALE: weight} if weight else {_SCALE: weight, _CREDIT: 0.0}
        for path, value in becomes.items():
            if self.values.get(path, value) != value:
                self.faults.append(
                    f"{origin} sets {SETTINGS[path].key} to {value:g}, but {self.origins[path]} says "
                    f"{self.values[path]:g}: remove the former"
                )
            self.values[path], self.origins[path] = value, origin
        instead = " and ".join(f"{SETTINGS[path].flag} {value:g}" for path, value in becomes.items())
        self.warnings.append(f"{origin} is deprecated: write {instead}.")

    def apply_load_aware(self) -> None:
        """Set what the preset stands for."""
        if not self.values.get(_LOAD_AWARE):
            return
        origin = self.origins[_LOAD_AWARE]
        for path, value in _LOAD_AWARE_SETS.items():
            if self.values.get(path, value) != value:
                self.faults.append(
                    f"{origin} sets {SETTINGS[path].key} to {_written(value)}, but {self.origins[path]} says "
                    f"{_written(self.values[path])}: remove one of them"
                )
            self.values[path], self.origins[path] = value, f"{origin} (preset)"

    def config(self) -> Config:
        """Check the whole and build it.

        Raises:
            ConfigError: With every fault found on the way here.
        """
        for path, value in self.values.items():
            setting = SETTINGS[path]
            if setting.pending and value != setting.default:
                self.warnings.append(
                    f"{setting.key}={_written(value)} ({self.origins[path]}): accepted for compatibility, "
                    "no effect in this version."
                )
        top: dict[str, Any] = {
            "endpoints": self._endpoints(),
            "workers_file": self.values.get("workers_file"),
            "endpoint_policies": self.values.get("endpoint_policies", ()),
        }
        top["workers"] = self._workers(top["endpoints"])
        sections = {name: self._values_of(name) for name in SECTIONS}
        # Unchecked objects first: building a checked one stops at its first contradiction.
        for name, model in SECTIONS.items():
            self._note_contradictions(f"{name}.", model.model_construct(**sections[name]))
        router = RouterConfig.model_construct(**sections["router"])
        self._note_idle(router)
        self._note_contradictions("", Config.model_construct(**top, router=router))
        if self.faults:
            raise ConfigError(list(dict.fromkeys(self.faults)))
        top |= {name: model(**sections[name]) for name, model in SECTIONS.items()}
        return Config(**top, warnings=tuple(dict.fromkeys(self.warnings)), origins=self.origins)

    def _note_idle(self, router: RouterConfig) -> None:
        """Warn of what belongs to choices that were not made."""
        by_endpoint = {name for policy in self.values.get("endpoint_policies", ()) for name in policy.settings}
        for field, needed, choice in router.idle():
            if (path := f"router.{field}") in self.values and needed not in by_endpoint:
                self.warnings.append(f"{self.origins[path]}: no effect without {choice}.")

    def _values_of(self, section: str) -> dict[str, Any]:
        prefix = f"{section}."
        return {path.removeprefix(prefix): value for path, value in self.values.items() if path.startswith(prefix)}

    def _endpoints(self) -> tuple[str, ...]:
        endpoints: tuple[str, ...] = self.values.get("endpoints", ())
        if not endpoints and "endpoints" not in self.bad:
            self.faults.append("no endpoint is given; write --endpoint namespace.component.endpoint")
            self.bad.add("endpoints")
        return endpoints

    def _workers(self, endpoints: tuple[str, ...]) -> tuple[WorkerSpec, ...]:
        entries = list(self.values.get("workers", ()))
        file: Path | None = self.values.get("workers_file")
        try:
            if file is not None:
                entries += read_entries(file)
            return specs(entries, endpoints or ("unknown",))
        except ConfigError as error:
            self.faults += error.faults
            self.bad.add("workers")
            return ()

    def _note_contradictions(self, prefix: str, section: Section) -> None:
        unknown = self.bad - self.values.keys()
        for fields, text in section.contradictions():
            paths = [f"{prefix}{field}" for field in fields]
            if unknown.isdisjoint(paths):
                origins = [self.origins[path] for path in paths if path in self.origins]
                self.faults.append(f"{' and '.join(origins)}: {text}")


_LISTS: Mapping[str, Callable[..., Any]] = {"workers": parse_entries, "endpoint_policies": parse_policies}


def _parse(given: Given) -> Any:
    setting, value = given.setting, given.value
    if setting.path in _LISTS:
        if isinstance(value, str) and given.text:
            value = [part for part in value.split(setting.separator) if part.strip()]
        return _LISTS[setting.path](value, given.origin, text=given.text)
    try:
        if not given.text:
            return setting.parse_yaml(value)
        if isinstance(value, bool):
            return setting.parse_text(str(value))
        return setting.parse_text(value) if isinstance(value, str) else setting.parse_items(value)
    except ValueError as error:
        raise ConfigError([f"{given.origin}: {error}"]) from None


def _written(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
