"""Small C parts of the benchmark, built on first use with the compiler that builds the core."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

from bench.side import ROOT

VENDOR = ROOT / "src/kvrouter_grpc/core/vendor"


def library(name: str) -> ctypes.CDLL:
    """The shared library of `{name}.c` beside this file.

    Raises:
        subprocess.CalledProcessError: It cannot be compiled; the compiler has said why.
    """
    source = Path(__file__).with_name(f"{name}.c")
    built = ROOT / f".cache/bench/{name}.so"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        built.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-O2", "-shared", "-fPIC", f"-I{VENDOR}", "-o", built, source], check=True)
    return ctypes.CDLL(str(built))
