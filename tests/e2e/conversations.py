"""People in conversations, seeded: several turns each, over a few shared system prompts; each waits for its answer."""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from e2e.engines import FIRST_WORD, VOCABULARY
from e2e.router import Reply, Router


@dataclass(frozen=True)
class Crowd:
    """Who talks, and how much. Lengths are tokens.

    Attributes:
        users: People, each of them in one conversation at a time.
        conversations: That each of them has, one after the other.
        turns: Of a conversation.
        systems: System prompts that conversations begin with; each is as likely.
        system_tokens: Length of each.
        question_tokens: Shortest and longest question.
        answer_tokens: Length of each answer.
        think_s: Mean time between an answer and the next question; exponential.
    """

    users: int = 16
    conversations: int = 2
    turns: int = 6
    systems: int = 4
    system_tokens: int = 512
    question_tokens: tuple[int, int] = (150, 450)
    answer_tokens: int = 8
    think_s: float = 3.0

    @property
    def requests(self) -> int:
        """That are sent in all."""
        return self.users * self.conversations * self.turns


@dataclass(frozen=True)
class Turn:
    """A question that was answered. Times are seconds from when it was sent."""

    engine: str
    prompt_tokens: int
    cached_tokens: int  # as the engine counted them
    expected_tokens: int  # as the router foretold them
    first_token_s: float
    end_s: float


async def talk(router: Router, crowd: Crowd, seed: int) -> list[Turn]:
    """Send everything through a router; the same seed says the same, whatever becomes of it.

    Returns:
        The turns in the order in which they ended.
    """
    source = random.Random(f"systems {seed}")
    systems = [_words(source, crowd.system_tokens) for _ in range(crowd.systems)]
    turns: list[Turn] = []
    async with asyncio.TaskGroup() as people:
        for number in range(crowd.users):
            people.create_task(_person(router, crowd, systems, random.Random(f"{seed} {number}"), turns))
    return turns


async def _person(
    router: Router, crowd: Crowd, systems: Sequence[list[int]], source: random.Random, turns: list[Turn]
) -> None:
    for _ in range(crowd.conversations):
        said = list(source.choice(systems))
        for _ in range(crowd.turns):
            await asyncio.sleep(source.expovariate(1 / crowd.think_s))
            said += _words(source, source.randint(*crowd.question_tokens))
            turn, answer = await _ask(router, said, crowd.answer_tokens)
            turns.append(turn)
            said += answer


async def _ask(router: Router, prompt: Sequence[int], answer_tokens: int) -> tuple[Turn, list[int]]:
    reply = Reply()
    first_token_s = 0.0
    sent = time.perf_counter()
    async with router.stream(prompt, answer_tokens) as stream:
        async for chunk in stream:
            reply.add(chunk)
            if reply.token_ids and not first_token_s:
                first_token_s = time.perf_counter() - sent
    usage = reply.usage
    assert usage.cached_tokens is not None
    expected = reply.routing.expected_cached_tokens
    end_s = time.perf_counter() - sent
    turn = Turn(reply.routing.worker_name, usage.prompt_tokens, usage.cached_tokens, expected, first_token_s, end_s)
    return turn, reply.token_ids


def _words(source: random.Random, count: int) -> list[int]:
    return source.choices(range(FIRST_WORD, VOCABULARY), k=count)


# --- figures ---------------------------------------------------------------------------------------------------------


def cached_share(turns: Sequence[Turn]) -> float:
    """Prompt tokens that the engines had cached, of all."""
    return sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns)


def computed_tokens(turns: Sequence[Turn]) -> Counter[str]:
    """Prompt tokens that each engine had to compute."""
    computed: Counter[str] = Counter()
    for turn in turns:
        computed[turn.engine] += turn.prompt_tokens - turn.cached_tokens
    return computed


def exact_share(turns: Sequence[Turn]) -> float:
    """Turns of whose prompts the engine had cached what the router foretold, of all."""
    return statistics.fmean(turn.cached_tokens == turn.expected_tokens for turn in turns)


def mean_first_token_s(turns: Sequence[Turn]) -> float:
    """Mean time to the first token, seconds."""
    return statistics.fmean(turn.first_token_s for turn in turns)
