from typing import final

from typing_extensions import Buffer

@final
class TokenIds:
    """The token ids of a prompt, immutable; a buffer of u32 (format `I`) for the functions that hash it.

    Ids that came in a message stay where they are in it, so the buffer may lie at any address: it is read byte by
    byte or with unaligned loads.

    Args:
        tokens: Token ids as any C-contiguous buffer of u32 or of bytes; copied.

    Raises:
        ValueError: The number of bytes is no multiple of 4.
    """

    def __init__(self, tokens: Buffer = b"") -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def fit(self, most: int, end: int) -> bool:
        """Whether there are 1 to `most` ids, all below `end`; `end` is at most 2**31."""

    def first_at_least(self, end: int) -> int:
        """The position of the first id that is `end` or more, -1 if there is none; `end` is at most 2**31."""

    def tobytes(self) -> bytes:
        """The ids as little-endian u32."""

    def tolist(self) -> list[int]:
        """The ids as a list."""

def json_array(tokens: Buffer) -> bytes:
    """A C-contiguous buffer of u32 as a JSON array of numbers, without spaces."""
