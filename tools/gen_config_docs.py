"""Write the tables of docs/configuration.md from the configuration model.

usage: gen_config_docs.py [--check]

`--check` writes nothing and exits 1 when the page differs from what the model gives.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from kvrouter_grpc.config.settings import SECTIONS, SETTINGS, WORKER_SETTINGS, Setting

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _default(setting: Setting) -> str:
    value = setting.default
    if setting.required:
        return "required"
    if value is None or value in ((), ""):
        return "none"
    return _code(str(value).lower() if isinstance(value, bool) else str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["-"] * len(head), *([_cell(item) for item in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _flag(setting: Setting) -> str:
    negated = f", {_code(setting.flag.replace('--', '--no-', 1))}" if setting.switch else ""
    return _code(setting.flag) + negated


def _settings(chosen: Iterable[Setting]) -> str:
    return _table(
        ("Key", "Value", "Default", "Meaning", "Flag", "Environment"),
        (
            (
                _code(setting.key),
                setting.syntax,
                _default(setting),
                setting.info.description or "",
                _flag(setting),
                ", ".join(_code(name) for name in setting.env),
            )
            for setting in chosen
        ),
    )


def _worker_keys() -> str:
    return _table(
        ("Key", "Value", "Default", "Meaning"),
        ((_code(key.key), key.syntax, _default(key), key.info.description or "") for key in WORKER_SETTINGS.values()),
    )


def _deprecated() -> str:
    every = SETTINGS.values()
    rows = [(_code(old), _code(setting.flag)) for setting in every for old in setting.legacy_flags]
    rows += [(_code(old), _code(setting.env[0])) for setting in every for old in setting.names.legacy_env]
    return _table(("Old name", "New name"), rows)


def _block(name: str) -> str:
    """The text of one generated block of the page."""
    active = [setting for setting in SETTINGS.values() if not setting.pending and not setting.retired]
    if name == "workers":
        return _worker_keys()
    if name == "deprecated":
        return _deprecated()
    if name == "pending":
        return _settings(setting for setting in SETTINGS.values() if setting.pending)
    if name == "fleet":
        return _settings(setting for setting in active if not setting.section)
    if name not in SECTIONS:
        sys.exit(f"{PAGE}: no block is called {name}")
    return _settings(setting for setting in active if setting.section == name)


def main() -> None:
    """Rewrite or check the page."""
    page = PAGE.read_text()
    wanted = {"fleet", "workers", "pending", "deprecated", *SECTIONS}
    missing = wanted - {match["name"] for match in BLOCK.finditer(page)}
    if missing:
        sys.exit(f"{PAGE}: blocks are missing: {', '.join(sorted(missing))}")
    fresh = BLOCK.sub(lambda match: f"{match[1]}{_block(match['name'])}{match[3]}", page)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(fresh)
    elif fresh != page:
        sys.exit(f"{PAGE} is not up to date: run make config-docs")


if __name__ == "__main__":
    main()
