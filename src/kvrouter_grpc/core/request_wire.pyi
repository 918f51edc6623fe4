from kvrouter_grpc.core.token_ids import TokenIds

def split(message: bytes) -> tuple[TokenIds, bytes, int] | None:
    """Take the token ids out of a request.

    Args:
        message: A serialized message whose field 1 is `repeated fixed32`, in any valid encoding.

    Returns:
        The ids of field 1, in place where they are one packed array and copied where they are scattered; the message
        without them; and which fields that rest has: bit n for field n, bit 0 for any beyond 63. None when the bytes
        are no message; protobuf's parser may still refuse the rest.
    """

def split_batch(message: bytes, most: int) -> tuple[list[tuple[TokenIds, bytes, int] | None], int] | None:
    """Take the requests out of a batch and the token ids out of each.

    Args:
        message: A serialized message whose field 1 is repeated and holds messages as `split` takes them. Other fields
            are passed over.
        most: Requests to split; those beyond are only counted.

    Returns:
        Each request as `split` gives it, and how many there are. None when the bytes are no message.
    """
