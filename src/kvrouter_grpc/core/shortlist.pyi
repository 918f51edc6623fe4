from array import array

class Shortlist:
    """The rows among which a decision chooses, and what is to be remembered of how it came to them.

    Args:
        rows: Of the target table, `array("I")`.
        occasion: Whatever explains the rows; it is kept with the recording of the decision.
        preferences: For each row the sum of the request's preferences for its taints, `array("d")`; None: 0.

    Raises:
        ValueError: An array of another type.
    """

    rows: array[int]
    occasion: object
    preferences: array[float] | None

    def __init__(self, rows: array[int], occasion: object = None, preferences: array[float] | None = None) -> None: ...
