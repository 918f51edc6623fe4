from kvrouter_grpc.core.choice import Choice
from kvrouter_grpc.types import EngineChunk

def best_worker_head(worker_id: int, dp_rank: int, worker_name: str, url: str) -> bytes:
    """Write the fields of a BestWorkerIdResponse that name its target.

    Raises:
        OverflowError: An id beyond u64, or a rank beyond u32.
    """

def best_worker_reply(
    head: bytes, choice: Choice, load: tuple[int, int, int], prompt_tokens: int, block_size: int
) -> bytes:
    """Write a BestWorkerIdResponse without candidates and reservation.

    Args:
        head: Of the chosen target, as `best_worker_head` wrote it.
        choice: The decision.
        load: Of the target: active requests, queued prefill tokens, active blocks.
        prompt_tokens: Tokens of the prompt.
        block_size: Tokens per block; 0 while that is not known.
    """

def delimited(field: int, content: bytes) -> bytes:
    """Write a field that holds a message or a text: its tag, its length and its content."""

def answer_reply(chunk: EngineChunk) -> bytes | None:
    """Write a GenerateResponse of one chunk, if it has nothing but tokens, text and totals, as nearly all have.

    Returns:
        The message; None for a chunk that has more.

    Raises:
        OverflowError: A number that is no u32, or a total that is no u64.
        UnicodeEncodeError: The text has half a surrogate pair.
    """
