from kvrouter_grpc.core.token_ids import TokenIds

def split(message: bytes, start: int = 0, stop: int = -1) -> tuple[TokenIds, bytes] | None:
    """Take the token ids out of a request.

    Args:
        message: A serialized message whose field 1 is `repeated fixed32`, in any valid encoding.
        start: Where it begins in these bytes.
        stop: Where it ends; -1: with them.

    Returns:
        The ids of field 1, in place where they are one packed array and copied where they are scattered; and the
        message without them. None when the bytes are no message; protobuf's parser may still refuse the rest.

    Raises:
        ValueError: The bytes have no such part.
    """

def entries(message: bytes, most: int) -> tuple[list[tuple[int, int]], int] | None:
    """Find the requests of a batch.

    Args:
        message: A serialized message whose field 1 is repeated and holds messages. Other fields are passed over.
        most: Requests to find; those beyond are only counted.

    Returns:
        Where each begins and ends, and how many there are. None when the bytes are no message.
    """

def read_plain(
    message: bytes, most: int, token_end: int, start: int = 0, stop: int = -1
) -> tuple[TokenIds, str, str, str] | None:
    """Read a BestWorkerIdRequest that is plain and right, as nearly all are: without protobuf, and in place.

    Plain is one that has one packed array of token ids and at most an endpoint, a model and a request id, each once.

    Args:
        message: The serialized request.
        most: Tokens that it may have.
        token_end: Token ids are below this.
        start: As for `split`, as the next.
        stop: As for `split`.

    Returns:
        Its token ids, endpoint, model and request id. None when it is not plain, or something is wrong with it.

    Raises:
        ValueError: The bytes have no such part.
    """
