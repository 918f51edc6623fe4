"""Builds the compiled modules. Everything else is declared in pyproject.toml.

Environment:
    KVROUTER_DEBUG=1  bounds checks, line tracing and annotated C
    KVROUTER_SANITIZE=1  AddressSanitizer and UndefinedBehaviorSanitizer

Both also count what lives in the trees, and a test run fails that ends with anything left (tests/conftest.py).
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCE = Path("src")
CORE = SOURCE / "kvrouter_grpc/core"
DEBUG = os.environ.get("KVROUTER_DEBUG") == "1"
SANITIZE = os.environ.get("KVROUTER_SANITIZE") == "1"

# Not -O3: in every module (hashes, decisions, events, requests) it changes CPU time by -2 to +3.5 % and instructions by
# -5 to +1 %, for a fifth more code; and between two calls gRPC throws our code out of the caches. Where vector code
# pays, the function asks for it: see core/token_ids.pyx.
compile_args = ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-std=c11"]
link_args: list[str] = []
macros: list[tuple[str, str | None]] = [("XXH_INLINE_ALL", None)]
if DEBUG:
    compile_args += ["-O0", "-g"]
    macros.append(("CYTHON_TRACE_NOGIL", "1"))
if DEBUG or SANITIZE:
    macros.append(("KVROUTER_COUNTED", None))
if SANITIZE:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    compile_args += flags
    link_args += flags

extensions = [
    Extension(
        ".".join(source.relative_to(SOURCE).with_suffix("").parts),
        [str(source)],
        depends=[str(header) for header in CORE.glob("**/*.h")],
        include_dirs=[str(CORE / "vendor"), str(CORE)],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for source in sorted(SOURCE.glob("**/*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        language_level=3,
        annotate=DEBUG,
        compiler_directives={
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": DEBUG,
            "linetrace": DEBUG,
            "embedsignature": True,
        },
    )
)
