"""The peers, each in an environment of its own under `.cache/bench`, installed from the package index."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.side import ROOT

if TYPE_CHECKING:
    from bench.harness import Bench

CACHE = ROOT / ".cache/bench"
DYNAMO = ("ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1")
DYNAMO_NEEDS = (
    "aiohttp==3.14.5", "grpcio==1.85.1", "httpx==0.28.1", "msgpack==1.2.4", "msgspec==0.22.0", "numpy==2.4.6",
    "orjson==3.13.0", "packaging==26.3", "prometheus-client==0.26.0", "protobuf==7.36.2", "psutil==7.2.2",
    "pydantic==2.13.5", "pyyaml==6.0.3", "pyzmq==27.3.0", "redis==8.1.0", "tqdm==4.70.1", "uvloop==0.23.0",
    "xxhash==4.1.0", "zstandard==0.25.0",
)  # fmt: skip
PLOTS = ("matplotlib==3.11.2",)


def dynamo_python(bench: "Bench") -> Path | None:
    """The interpreter of Dynamo's environment, or None with a remark when it is not there or not wanted."""
    python = CACHE / "dynamo/bin/python"
    if not bench.with_peers:
        return None
    if not python.exists():
        bench.figures.note("Dynamo is not installed (make bench-peers), so its columns are empty")
        return None
    return python


def _install(name: str, *steps: tuple[str, ...]) -> None:
    """Make an environment, once per list of packages.

    Raises:
        subprocess.CalledProcessError: A package cannot be installed.
    """
    home = CACHE / name
    stamp = home / ".installed"
    wanted = "\n".join(" ".join(step) for step in steps)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {name} into {home.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    for step in steps:
        pip = [str(home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", *step]
        subprocess.run(pip, check=True)
    stamp.write_text(wanted)


def main() -> int:
    """Install what can be installed; 0 in any case, since the benchmark runs without as well."""
    # Their router needs neither torch nor the inference engines that the packages ask for, hence --no-deps; and last,
    # so that pip does not complain about it.
    steps = {"dynamo": (DYNAMO_NEEDS, ("--no-deps", *DYNAMO)), "plots": (PLOTS,)}
    for name, packages in steps.items():
        try:
            _install(name, *packages)
        except subprocess.CalledProcessError as error:
            print(f"{name} cannot be installed ({error}); the benchmark runs without it", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
