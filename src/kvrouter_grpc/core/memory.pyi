def live() -> dict[str, int] | None:
    """What lives in all trees and feeds of the process: `edges`, `runs`, `allocations`, `bytes`.

    Only builds with KVROUTER_DEBUG=1 or KVROUTER_SANITIZE=1 count; None from others.
    """
