"""A small agent-like workload: conversations that share system prompts and grow turn by turn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST_TOKEN, LAST_TOKEN = 300, 20_000  # ordinary words of the mock workers' vocabulary


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of what."""

    conversations: int = 24
    turns: int = 5
    system_prompts: int = 3
    system_tokens: int = 800
    user_tokens: int = 160
    answer_tokens: int = 48
    concurrency: int = 8

    @property
    def requests(self) -> int:
        """Requests of one run."""
        return self.conversations * self.turns


@dataclass(slots=True)
class Conversation:
    """One conversation: all that was said so far, as token ids."""

    name: str
    tokens: list[int]
    questions: list[list[int]] = field(default_factory=list)  # what the user will say, turn by turn

    def ask(self, turn: int) -> list[int]:
        """The prompt of a turn: everything said before, and the new question."""
        self.tokens += self.questions[turn]
        return self.tokens

    def answered(self, tokens: Sequence[int]) -> None:
        """Note what the model said."""
        self.tokens += tokens


def conversations(shape: Shape, seed: int) -> list[Conversation]:
    """The same conversations for the same seed."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]

    systems = [words(shape.system_tokens) for _ in range(shape.system_prompts)]
    return [
        Conversation(
            f"chat-{number:02}",
            list(systems[number % shape.system_prompts]),
            [words(rng.randint(shape.user_tokens // 2, shape.user_tokens * 3 // 2)) for _ in range(shape.turns)],
        )
        for number in range(shape.conversations)
    ]
