"""What the demo shows while it runs, and its result."""

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvrouter_grpc.demo.run import Run, Turn

RECENT = 10  # decisions shown
TEXT_LINES = 3  # lines of a stream shown


def live(run: Run, before: Run | None) -> RenderableType:
    """The screen in the middle of a run."""
    layout = Layout()
    layout.split_column(
        Layout(_progress(run, before), size=3),
        Layout(_decisions(run), size=RECENT + 5),
        Layout(name="below"),
    )
    layout["below"].split_row(Layout(_workers(run)), Layout(_streams(run)))
    return layout


def _progress(run: Run, before: Run | None) -> RenderableType:
    done = len(run.finished)
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(ratio=2)
    line.add_column(ratio=3)
    line.add_column(ratio=4)
    figures = f"hit ratio [bold green]{run.hit_ratio:5.1%}[/]  mean TTFT [bold]{run.mean_ttft_s * 1e3:4.0f} ms[/]"
    if before is not None:
        figures += f"   [dim]({before.title}: {before.hit_ratio:.1%}, {before.mean_ttft_s * 1e3:.0f} ms)[/]"
    line.add_row(
        f"[bold]{run.title}[/]  {done}/{run.shape.requests}",
        ProgressBar(total=run.shape.requests, completed=done),
        figures,
    )
    return Panel(line, border_style="cyan")


def _decisions(run: Run) -> RenderableType:
    table = Table(expand=True, box=None, header_style="bold")
    for column in (
        "conversation",
        "turn",
        "goes to",
        "prompt",
        "cached there",
        "",
        "waiting there",
        "because (cost per worker)",
    ):
        table.add_column(column, justify="right" if column in ("turn", "prompt", "waiting there") else "left")
    for turn in run.turns[-RECENT:]:
        decided = turn.decided
        share = turn.predicted_tokens / turn.prompt_tokens
        size = max(1, decided.block_size)
        table.add_row(
            turn.conversation,
            str(turn.number + 1),
            f"[bold]{turn.worker}[/]",
            f"{turn.prompt_tokens} tok",
            Bar(1.0, 0, share, width=16, color="green"),
            f"{turn.predicted_tokens // size}/{turn.prompt_tokens // size} blocks",
            f"{decided.load.queued_prefill_tokens} tok",
            _costs(turn),
        )
    return Panel(table, title="decisions (BestWorkerId, then Generate)", border_style="blue")


def _costs(turn: Turn) -> Text:
    text = Text()
    for candidate in sorted(turn.decided.candidates, key=lambda candidate: candidate.worker_name):
        style = "bold green" if candidate.worker_id == turn.decided.worker_id else "dim"
        text.append(f"{candidate.worker_name.removeprefix('worker-')}:{candidate.cost:.0f} ", style)
    return text


def _workers(run: Run) -> RenderableType:
    table = Table(expand=True, box=None, header_style="bold")
    for column in ("worker", "KV cache", "", "running", "waiting", "served"):
        table.add_column(column)
    for load in run.loads():
        table.add_row(
            load.name,
            Bar(max(1, load.total_blocks), 0, load.cached_blocks, width=18, color="yellow"),
            f"{load.cached_blocks} blocks",
            str(load.active_requests),
            f"{load.queued_tokens} tok",
            str(load.served),
        )
    return Panel(table, title="workers, as their KV events tell", border_style="yellow")


def _streams(run: Run) -> RenderableType:
    open_turns = [turn for turn in run.turns if not turn.done and turn.text][-4:]
    lines = [
        Text.assemble((f"{turn.conversation} ", "bold"), (f"[{turn.worker}] ", "cyan"), _tail(turn.text))
        for turn in open_turns
    ]
    return Panel(Group(*lines), title="streams", border_style="magenta")


def _tail(text: str) -> str:
    return text[-60 * TEXT_LINES :].replace("\n", " ")


def plain(turn: Turn) -> str:
    """One finished turn as a line, for logs and pipes."""
    return (
        f"  {turn.conversation} turn {turn.number + 1}: {turn.worker}  prompt {turn.prompt_tokens:5} tokens, "
        f"predicted cached {turn.predicted_tokens:5}, engine found {turn.cached_tokens:5}, "
        f"TTFT {turn.ttft_s * 1e3:4.0f} ms, {turn.output_tokens} tokens streamed"
    )


def result(runs: list[Run]) -> RenderableType:
    """The comparison at the end."""
    table = Table(title="Same workload, same workers", header_style="bold")
    for column in ("policy", "requests", "prompt tokens found cached", "mean TTFT", "p99 TTFT", "seconds"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for run in runs:
        table.add_row(
            run.title,
            str(len(run.finished)),
            f"{run.hit_ratio:.1%}",
            f"{run.mean_ttft_s * 1e3:.0f} ms",
            f"{run.p99_ttft_s * 1e3:.0f} ms",
            f"{run.seconds:.1f}",
        )
    exact = sum(turn.predicted_tokens == turn.cached_tokens for turn in runs[-1].finished)
    note = Text(
        f"The router predicted the engine's cached tokens exactly for {exact} of {len(runs[-1].finished)} requests "
        f"({runs[-1].title})."
    )
    return Group(table, note)
