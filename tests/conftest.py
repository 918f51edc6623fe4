"""Property tests are seeded, so that a run can be repeated; KVROUTER_EXPLORE=1 looks for new cases instead."""

import os

from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("explore" if os.environ.get("KVROUTER_EXPLORE") == "1" else "seeded")
