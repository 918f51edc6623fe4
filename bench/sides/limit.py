"""Side: the physical limit of hashing, in C (`limit.c`), built on first use with the compiler that builds the core."""

import ctypes
import os
import subprocess
from array import array
from pathlib import Path

from bench import work
from bench.side import ROOT, serve

SEED = 1337


def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("limit.c")
    built = ROOT / ".cache/bench/limit.so"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        built.parent.mkdir(parents=True, exist_ok=True)
        vendor = ROOT / "src/kvrouter_grpc/core/vendor"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", f"-I{vendor}", "-o", built, source], check=True)
    library = ctypes.CDLL(str(built))
    library.limit_hash.restype = ctypes.c_double
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.limit_hash.argtypes = [pointer, size, size, ctypes.c_uint64, size, size, pointer]
    return library


_lib = _library()


def hash_prompt(tokens: int, batches: int, repeats: int) -> float:
    """Microseconds per prompt: every block hashed, every hash chained to the one before."""
    prompt = work.prompt(tokens)
    blocks = tokens // work.BLOCK
    out = array("Q", bytes(8 * blocks))
    taken: float = _lib.limit_hash(
        prompt.buffer_info()[0], blocks, work.BLOCK, SEED, batches, repeats, out.buffer_info()[0]
    )
    return taken / 1000


if __name__ == "__main__":
    serve([hash_prompt])
