"""Models with several KV cache groups: vLLM's own cache manager against what the router foretells from its events."""

import os
import subprocess

import pytest

from contract.hybrid import hits_by_model
from e2e.engines import CACHE, E2E

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("version", ["0.32.0", "0.28.0"])
def test_every_hit_is_foretold(version: str) -> None:
    done = subprocess.run(
        [CACHE / "common" / "bin" / "python", E2E / "hybrid_cache.py", "120"],
        env={**os.environ, "PYTHONPATH": str(CACHE / version), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = hits_by_model(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert len(found) == 10
    assert {model: counts["wrong"] for model, counts in found.items()} == dict.fromkeys(found, 0)
    assert all(counts["cached"] > 20 for counts in found.values()), found
