"""Build what `make test-vllm` runs: real vLLM engines for the CPU, and a tiny model for them.

    python tools/vllm_env.py            create or complete .cache/vllm (idempotent)
    python tools/vllm_env.py --check    exit 0 when it is complete, 1 when not; changes nothing

All engines import one set of libraries, so there is one virtual environment, and each vLLM lies in a folder
of its own, first on PYTHONPATH: a second engine costs seconds and half a gigabyte, not a second PyTorch.

    .cache/vllm/common/     virtual environment: tests/e2e/requirements/common.txt
    .cache/vllm/0.32.0/     tests/e2e/requirements/vllm-0.32.0.txt, and so on for each such file
    .cache/vllm/nixl/       tests/e2e/requirements/nixl.txt: what moves KV blocks between engines
    .cache/vllm/model/      the tiny random Llama of tests/e2e/tiny_model.py, and model-lora/ beside it

Every part carries a stamp of what it was built from; a part whose stamp differs is built again from nothing.
pip takes its indexes from the machine's own pip configuration. PyTorch publishes its CPU builds on an index
of its own: where pip's `find-links` has no such wheel, set KVROUTER_TORCH_INDEX to the URL of that index.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
E2E = ROOT / "tests" / "e2e"
REQUIREMENTS = E2E / "requirements"
CACHE = ROOT / ".cache" / "vllm"
PYTHON = CACHE / "common" / "bin" / "python"
MODEL = CACHE / "model"
TORCH_INDEX = "KVROUTER_TORCH_INDEX"
STAMP = ".built-from"


class BuildError(Exception):
    """A part could not be built; the message says which and what to do."""


def say(text: str) -> None:
    """One progress line, at once."""
    print(f"vllm-env: {text}", flush=True)


def run(part: str, *command: str | Path) -> None:
    """Run a build step quietly.

    Raises:
        BuildError: It failed; the last lines of its output are in the message.
    """
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        raise BuildError(f"{part}: `{Path(str(command[0])).name}` failed ({result.returncode})\n{tail}")


def pip_install(part: str, requirements: Path, *options: str | Path) -> None:
    """Install pinned requirements exactly as listed.

    Raises:
        BuildError: pip failed.
    """
    extra = [f"--extra-index-url={url}"] if (url := os.environ.get(TORCH_INDEX)) else []
    try:
        run(
            part,
            PYTHON,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--compile",
            *extra,
            *options,
            "-r",
            requirements,
        )
    except BuildError as error:
        if "torch==" in str(error) and not extra:
            hint = f"set {TORCH_INDEX} to the URL of PyTorch's CPU wheel index"
            raise BuildError(f"{error}\nThe CPU build of torch was not found: {hint}.") from None
        raise


def build_common() -> None:
    """The virtual environment with everything but vLLM."""
    run("common", sys.executable, "-m", "venv", PYTHON.parent.parent)
    pip_install("common", REQUIREMENTS / "common.txt")


def build_engine(requirements: Path, folder: Path) -> None:
    """One vLLM, or what it can do without, importable from `folder`."""
    pip_install(folder.name, requirements, "--target", folder)


def build_model() -> None:
    """The tiny model; it needs the libraries of the engines, not vLLM."""
    run("model", PYTHON, E2E / "tiny_model.py", MODEL)


def parts() -> list[tuple[Path, list[Path], Callable[[], None]]]:
    """Folder, the files it is built from, and how, in building order."""
    common, nixl = REQUIREMENTS / "common.txt", REQUIREMENTS / "nixl.txt"
    engines: list[tuple[Path, list[Path], Callable[[], None]]] = []
    for file in sorted(REQUIREMENTS.glob("vllm-*.txt")):
        folder = CACHE / file.stem.removeprefix("vllm-")
        engines.append((folder, [common, file], partial(build_engine, file, folder)))
    return [
        (PYTHON.parent.parent, [common], build_common),
        *engines,
        (CACHE / "nixl", [common, nixl], partial(build_engine, nixl, CACHE / "nixl")),
        (MODEL, [common, E2E / "tiny_model.py"], build_model),
    ]


def fingerprint(sources: list[Path]) -> str:
    """What a part depends on: its sources and the Python it is built with."""
    digest = hashlib.sha256(sys.version.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def built(folder: Path, sources: list[Path]) -> bool:
    """Whether the part is there and up to date."""
    stamp = folder / STAMP
    return stamp.exists() and stamp.read_text() == fingerprint(sources)


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the environment of `make test-vllm`.")
    parser.add_argument("--check", action="store_true", help="only say whether everything is built")
    options = parser.parse_args()
    for folder, sources, build in parts():
        if built(folder, sources):
            continue
        if options.check:
            say(f"{folder.name} is not built: run `python tools/vllm_env.py`")
            return 1
        say(f"building {folder.name} ...")
        started = time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            build()
        except BuildError as error:
            say(str(error))
            return 1
        (folder / STAMP).write_text(fingerprint(sources))
        say(f"built {folder.name} in {time.monotonic() - started:.0f} s")
    say(f"complete in {CACHE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
