"""Builds the compiled modules with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests.

The build is a copy of its own: the modules of the source tree stay as they are. Arguments go to pytest. It needs gcc.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPY = ROOT / "build" / "sanitized"
REPORT = COPY / "report"
TESTS = [
    "tests/unit/test_block_hash.py",
    "tests/unit/test_radix_tree.py",
    "tests/unit/test_radix_twin.py",
    "tests/unit/test_slot_bytes.py",
    "tests/unit/test_orphans.py",
    "tests/unit/test_kv_messages.py",
    "tests/unit/test_target_table.py",
    "tests/unit/test_decider.py",
    "tests/unit/test_recording.py",
    "tests/unit/test_plain_requests.py",
    "tests/unit/test_kv_feed_twin.py",
    "tests/unit/test_index.py",
    "tests/unit/test_overlap_groups.py",
    "tests/contract/test_event_captures.py",
    "tests/contract/test_hybrid_captures.py",
    "tests/robustness/test_core_random.py",
    "tests/fuzz/test_frames.py",
    "tests/fuzz/test_request_wire.py",
    "tests/integration/test_subscriber.py",
]


def library(name: str) -> str:
    """Where gcc keeps a run-time library."""
    return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()


def build() -> None:
    """Compile a copy of the sources."""
    for part in ("src", "tests", "clients"):
        shutil.copytree(
            ROOT / part, COPY / part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, COPY / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=COPY,
        env={**os.environ, "KVROUTER_SANITIZE": "1"},
        check=True,
    )


def main() -> int:
    """Build, run, print what was found, and answer with pytest's exit code."""
    build()
    for report in COPY.glob("report.*"):
        report.unlink()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(COPY / part) for part in ("src", "tests", "clients/python/src")),
        "PYTHONMALLOC": "malloc",  # so that reads behind a bytes object are seen
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so"))),
        # CPython keeps much until the end of the process: what the modules leak is found by their own counts of bytes.
        "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:log_path={REPORT}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={REPORT}",
        # Instrumented code is several times slower; the full numbers run without.
        "KVROUTER_RANDOM_CALLS": os.environ.get("KVROUTER_RANDOM_CALLS", "100000"),
        "KVROUTER_FUZZ_FRAMES": os.environ.get("KVROUTER_FUZZ_FRAMES", "20000"),
    }
    arguments = sys.argv[1:] or TESTS
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=COPY,
        env=environment,
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
