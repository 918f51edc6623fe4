"""One answer in the making: what is asked, how far it has come, and why it ended."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kvrouter_grpc.mock_worker.blocks import BlockTable
from kvrouter_grpc.mock_worker.tokens import EOS_TOKEN, Walk, token_text

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class StopRules:
    """When an answer ends.

    Attributes:
        max_tokens: Output tokens at most.
        min_tokens: Output tokens before any stop rule but `max_tokens` counts.
        ignore_eos: An end-of-sequence token is a token like any other.
        stop_token_ids: Tokens that end the answer.
        stop: Strings that end the answer.
        include_stop: Keep the stop string in the text.
    """

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    include_stop: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request, as the engine works on it.

    Attributes:
        table: Its tokens and blocks.
        prompt_tokens: Leading tokens that are the prompt.
        rules: When it ends.
        walk: Its answer.
        notify: Called with it whenever it has new tokens or has ended.
        index: Which choice of its request it is.
        arrived: When it came, in the engine's clock (seconds).
        report_hits: Store events for reused blocks, too.
        remote_tokens: Prompt tokens whose KV another worker has computed and sent.
        keep_blocks: Keep the blocks after the end: a decode worker is to fetch them.
        computed: Tokens whose KV is there.
        cached_tokens: Prompt tokens found in the cache, None until it is first scheduled.
        finish_reason: Why it ended, None while it runs.
        stop_reason: The token or string that stopped it.
    """

    table: BlockTable
    prompt_tokens: int
    rules: StopRules
    walk: Walk
    notify: "Callable[[Sequence], None]"
    index: int = 0
    arrived: float = 0.0
    report_hits: bool = False
    remote_tokens: int = 0
    keep_blocks: bool = False
    computed: int = 0
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    _taken: int = field(init=False)  # leading tokens that were taken
    _text: str = ""  # text that was not taken yet
    _held_back: int = field(init=False)

    def __post_init__(self) -> None:
        self._taken = self.prompt_tokens
        # As many characters as may turn out to be the start of a stop string.
        self._held_back = max(0, max(map(len, self.rules.stop), default=0) - 1)

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.table.tokens) - self.prompt_tokens

    def take(self) -> tuple[list[int], str]:
        """The tokens and the text that came since the last call; text that may be cut off yet is kept back."""
        tokens = self.table.tokens[self._taken :]
        self._taken += len(tokens)
        end = len(self._text) if self.finish_reason else max(0, len(self._text) - self._held_back)
        text, self._text = self._text[:end], self._text[end:]
        return tokens, text

    def step(self) -> None:
        """Generate one token and see whether that ends the answer."""
        rules = self.rules
        token = self.walk.next()
        self.table.tokens.append(token)
        produced = self.output_tokens
        may_stop = produced >= rules.min_tokens
        if may_stop and token == EOS_TOKEN and not rules.ignore_eos:
            self.finish_reason = "stop"
        elif may_stop and token in rules.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token
        else:
            self._text += token_text(token)
            if may_stop and rules.stop:
                self._cut_at_stop()
            if self.finish_reason is None and produced >= rules.max_tokens:
                self.finish_reason = "length"

    def _cut_at_stop(self) -> None:
        for stop in self.rules.stop:
            found = self._text.find(stop)
            if found >= 0:
                self._text = self._text[: found + (len(stop) if self.rules.include_stop else 0)]
                self.finish_reason, self.stop_reason = "stop", stop
                return
