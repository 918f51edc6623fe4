"""Property tests are seeded, so that a run can be repeated; KVROUTER_EXPLORE=1 looks for new cases instead.

Debug and sanitized builds of the core count what lives: a run that leaves anything behind fails.
"""

import gc
import os

import pytest
from hypothesis import settings

from kvrouter_grpc.core.memory import live

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("explore" if os.environ.get("KVROUTER_EXPLORE") == "1" else "seeded")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # A failed test's traceback keeps its trees, so only a green run can be judged.
    if exitstatus != pytest.ExitCode.OK or live() is None:
        return
    gc.collect()
    left = {kind: count for kind, count in live().items() if count}
    say = session.config.pluginmanager.get_plugin("terminalreporter").write_line
    say("")
    say(f"left alive in the core: {left or 'nothing'}")
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
