"""README, quick start and examples, executed as they stand: only the ports differ."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pages import ROOT, Block, blocks, commands
from programs import Fleet, environment, fleet, program, wait_until_ready

VOLATILE = {"workerId", "workerName", "url"}  # follow from ports and names

Ports = dict[str, str]


def port(address: str) -> str:
    """The port of a URL or of `host:port`."""
    return address.rpartition(":")[2]


def with_ports(text: str, ports: Ports) -> str:
    """The text with the ports of the page replaced by those in use."""
    return re.sub(r"127\.0\.0\.1:(\d+)", lambda match: f"127.0.0.1:{ports.get(match[1], match[1])}", text)


def start(stack: ExitStack, block: Block, ports: Ports) -> None:
    """Run each command of a background block, on free ports, until the stack ends."""
    for command in commands(block.text):
        words = shlex.split(with_ports(command.removesuffix("&"), ports))
        assert words[0] == "kvrouter", command
        if words[1] == "mock-worker":
            free = {word: "0" for flag, word in pairwise(words) if flag.endswith("port")}
            said = stack.enter_context(program([free.get(word, word) for word in words[1:]])).said
            wanted = dict(pairwise(words))
            ports[wanted["--port"]] = port(said["url"])
            ports[wanted["--events-port"]] = port(said["events"][0])
            ports[wanted["--replay-port"]] = port(said["replay"][0])
        else:
            listen = words[words.index("--listen") + 1]
            free = {listen: "127.0.0.1:0"}
            workers = str(words.count("--worker"))
            serve = [free.get(word, word) for word in words[1:]]
            running = stack.enter_context(program([*serve, "--router-min-initial-workers", workers]))
            ports[port(listen)] = port(running.said["address"])
            wait_until_ready(running.said["address"])


def run(block: Block, ports: Ports) -> str:
    """What a block prints."""
    interpreter = {"shell": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    return execute([*interpreter, with_ports(block.text, ports)])


def execute(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def steady(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in VOLATILE}


@pytest.mark.parametrize(
    "page", ["README.md", "docs/quickstart.md", "docs/disaggregated.md", "docs/check.md", "docs/explain.md"]
)
def test_marked_blocks_do_what_the_page_says(page: str) -> None:
    marked = [block for block in blocks(ROOT / page) if block.marker]
    assert {block.marker for block in marked} - {"answer"} == {"run: background", "run"}
    ports: Ports = {}
    output = ""
    asked: Block | None = None
    with ExitStack() as stack:
        for block in marked:
            match block.marker:
                case "run: background":
                    start(stack, block, ports)
                case "run":
                    output, asked = run(block, ports), block
                    assert output.strip()
                case "answer":
                    assert asked is not None
                    assert_answer(json.loads(with_ports(block.text, ports)), asked, output, ports)


def assert_answer(expected: dict[str, Any], asked: Block, output: str, ports: Ports) -> None:
    """The answer is the page's. Events follow the answer they belong to, so the first reply may be too early."""
    for _ in range(50):
        answer = json.loads(output)
        if steady(answer) == steady(expected):
            break
        output = run(asked, ports)
    assert steady(answer) == steady(expected)
    assert answer.keys() == expected.keys()


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with fleet(2) as running:
        yield running


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, running: Fleet) -> None:
    assert execute([sys.executable, str(example), running.address]).strip()


def test_streaming_takes_ten_lines() -> None:
    for page in ("README.md", "docs/quickstart.md"):
        (python,) = (block.text for block in blocks(ROOT / page) if block.language == "python")
        assert len([line for line in python.splitlines() if line.strip()]) <= 10
        assert "router.generate" in python
