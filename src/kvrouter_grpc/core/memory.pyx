"""What lives in all trees and feeds of the process: a count that a test run has to end with at zero."""


def live():
    """Counts of what lives, or None when this build does not count."""
    return dict(LIVE) if COUNTED else None
