"""Says which inputs a fuzzing run is about to make, so that any run can be repeated."""

import os

NAMES = ("KVROUTER_FUZZ_SEED", "KVROUTER_FUZZ_FRAMES", "KVROUTER_FUZZ_REQUESTS")


def pytest_report_header() -> str:
    given = [f"{name}={os.environ[name]}" for name in NAMES if name in os.environ]
    return f"fuzz: {' '.join(given) or 'default seed and numbers'}"
