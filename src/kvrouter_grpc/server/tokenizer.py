"""Text to token ids, with the model's own tokenizer."""

import asyncio
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kvrouter_grpc.errors import ConfigError, OverloadedError

THREADS = 1  # a tokenizer may change its own settings on the first call, and then fails for whoever else uses it
MAX_WAITING = 256


class Tokenizer:
    """A Hugging Face tokenizer in a thread of its own, so that long texts do not hold up the event loop.

    Args:
        path: Directory or file of the tokenizer, as `transformers.AutoTokenizer` reads it.

    Raises:
        ConfigError: The extra is not installed, or nothing usable is at the path.
    """

    def __init__(self, path: Path) -> None:
        self._encode = _load(path)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")
        # Kept until the thread is done with it: a caller that went away does not shorten the queue.
        self._waiting: set[Future[array[int]]] = set()

    async def encode(self, text: str) -> "array[int]":
        """The token ids of a prompt, with the special tokens that vLLM's completions API would add.

        Raises:
            OverloadedError: Too many texts wait.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise OverloadedError("too many prompts wait for the tokenizer; send token_ids, or retry later")
        work = self._threads.submit(self._encode, text)
        self._waiting.add(work)
        work.add_done_callback(self._waiting.discard)
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """Stop the thread after the text in hand."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _load(path: Path) -> "Callable[[str], array[int]]":
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise ConfigError(
            ["server.tokenizer: text prompts need the extra: pip install 'kvrouter-grpc[tokenizer]'"]
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises nearly anything
        raise ConfigError([f"server.tokenizer: nothing that transformers reads as a tokenizer is at {path}"]) from error
    return lambda text: array("I", tokenizer(text, add_special_tokens=True)["input_ids"])
