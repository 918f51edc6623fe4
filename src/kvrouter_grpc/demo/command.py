"""The `kvrouter demo` command."""

import asyncio
import sys

import click
import uvloop
from rich.console import Console
from rich.live import Live

from kvrouter_grpc.config import LogConfig
from kvrouter_grpc.demo import screen
from kvrouter_grpc.demo.run import Run, drive
from kvrouter_grpc.demo.workload import Shape
from kvrouter_grpc.observability.logging import configure_logging

FRAMES_PER_S = 8


@click.command("demo")
@click.option("--workers", default=4, show_default=True, type=click.IntRange(1, 16), help="Mock workers to start.")
@click.option(
    "--conversations", default=24, show_default=True, type=click.IntRange(1, 200), help="Conversations to hold."
)
@click.option("--turns", default=5, show_default=True, type=click.IntRange(1, 20), help="Turns of each.")
@click.option("--seed", default=1, show_default=True, help="Of the workload and of the router's ties.")
@click.option("--plain", is_flag=True, help="One line per request instead of a screen; the default without a terminal.")
def demo_command(workers: int, conversations: int, turns: int, seed: int, plain: bool) -> None:
    """Show the router at work.

    Starts mock workers that behave like vLLM (KV cache, events, streams) and the real router over them, holds
    multi-turn conversations through it, first with round-robin and then with KV-aware routing, and compares.
    """
    configure_logging(LogConfig(level="error"))
    shape = Shape(conversations=conversations, turns=turns)
    console = Console()
    runs = [Run("round-robin", "round-robin", shape), Run("kv-aware", "kv", shape)]
    show = _lines if plain or not sys.stdout.isatty() else _screen
    for number, run in enumerate(runs):
        uvloop.run(show(console, run, runs[number - 1] if number else None, workers, seed))
    console.print(screen.result(runs))


async def _screen(console: Console, run: Run, before: Run | None, workers: int, seed: int) -> None:
    with Live(screen.live(run, before), console=console, screen=True, auto_refresh=False) as live:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(drive(run, workers=workers, seed=seed))
            while not task.done():
                live.update(screen.live(run, before), refresh=True)
                await asyncio.sleep(1 / FRAMES_PER_S)


async def _lines(console: Console, run: Run, _before: Run | None, workers: int, seed: int) -> None:
    console.print(
        f"{run.title}: {workers} workers, {run.shape.conversations} conversations of {run.shape.turns} turns",
        style="bold",
    )
    shown: set[int] = set()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(drive(run, workers=workers, seed=seed))
        while not task.done() or len(shown) < len(run.finished):
            for turn in run.finished:
                if id(turn) not in shown:
                    shown.add(id(turn))
                    console.print(screen.plain(turn), highlight=False)
            await asyncio.sleep(1 / FRAMES_PER_S)
