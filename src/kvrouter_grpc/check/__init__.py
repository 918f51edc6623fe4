"""`kvrouter check`: looks at every configured worker and says what to change before a router relies on it.

Looking (`observe`) and judging (`judge`) are apart: judgements are pure functions of what was seen.
"""

from kvrouter_grpc.check.observe import Scope
from kvrouter_grpc.check.run import run

__all__ = ["Scope", "run"]
