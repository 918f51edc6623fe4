"""A check from the configuration to the report."""

import asyncio
import random
import sys
from collections.abc import Callable
from dataclasses import replace

import uvloop
import zmq.asyncio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvrouter_grpc.check.judge import judge, judge_fleet
from kvrouter_grpc.check.observation import WorkerSeen
from kvrouter_grpc.check.observe import Observer, Scope
from kvrouter_grpc.check.report import Report, WorkerReport
from kvrouter_grpc.config import Config
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.server.tokenizer import Tokenizer
from kvrouter_grpc.upstream.session import engine_session
from kvrouter_grpc.upstream.vllm_http import VllmHttpClient

PLAIN_WIDTH = 160  # of the table where there is no terminal, such as in the log of a pipeline
FLEET = "all workers"


async def inspect(config: Config, scope: Scope, *, done: Callable[[str], None] = lambda _: None) -> Report:
    """Look at all workers of the configuration at once, and judge them.

    Args:
        config: The router's.
        scope: How far to go.
        done: Called with the name of each worker that has been looked at.

    Raises:
        ConfigError: The tokenizer cannot be read.
    """
    tokenizer = Tokenizer(config.server.tokenizer) if config.server.tokenizer is not None else None
    fleet = [
        WorkerSeen(spec, spec, router_block_size=config.router_of(spec.endpoint).block_size)
        for spec in (
            each if config.router.kv_events else replace(each, kv_events=False)  # as the router would
            for each in config.workers
        )
    ]
    context = zmq.asyncio.Context()
    context.max_sockets = 65_536
    try:
        async with engine_session() as session:
            observer = Observer(
                scope,
                config.events,
                context,
                lambda url: VllmHttpClient(url, session, config.upstream),
                tokenizer=tokenizer,
                rng=random.Random(),
            )

            async def look(seen: WorkerSeen) -> None:
                await observer.look(seen)
                done(seen.given.name)

            async with asyncio.TaskGroup() as group:
                for seen in fleet:
                    group.create_task(look(seen), name=f"check {seen.given.name}")
    finally:
        context.destroy(linger=0)
        if tokenizer is not None:
            tokenizer.close()
    workers = [WorkerReport(seen.given.name, seen.given.url, judge(seen)) for seen in fleet]
    together = judge_fleet(fleet)
    return Report([*workers, WorkerReport(FLEET, "", together)] if together else workers)


def run(config: Config, scope: Scope, *, problems: bool, as_json: bool) -> int:
    """Check, print the report on stdout and the progress on stderr, and give the exit code.

    Args:
        config: The router's.
        scope: How far to go.
        problems: Leave out what is as it should be.
        as_json: Print JSON, not a table.

    Raises:
        ConfigError: There are no workers to check.
    """
    if not config.workers:
        raise ConfigError(["no worker is given; write --worker url=http://host:port"])
    with Progress(
        TextColumn("checking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("", total=len(config.workers))
        report = uvloop.run(
            inspect(config, scope, done=lambda name: progress.update(task, advance=1, description=name))
        )
    if problems:
        report = report.problems()
    if as_json:
        sys.stdout.write(report.json().decode() + "\n")
    else:
        Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(report.table())
    return report.exit_code
