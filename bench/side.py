"""One side of a comparison: a process of its own that answers calls, one line of JSON each way.

A side's module ends with `serve({...})`, the functions that may be called by name; they may be coroutines. What a side
writes to standard output otherwise goes to its standard error, since libraries like to talk.
"""

import asyncio
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, cast

ROOT = Path(__file__).resolve().parents[1]


class SideError(Exception):
    """The side failed; the text is its traceback."""


class Side:
    """A running side. Ends with the `with` block.

    Args:
        module: What to run, `bench.sides.ours`.
        arguments: Of the module.
        python: The interpreter, that of the side's own environment.
        env: Added to the environment.
        prefix: A program that runs the interpreter, such as valgrind.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: str | Path = sys.executable,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._log = (ROOT / ".cache/bench").joinpath(f"{module}.log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*prefix, str(python), "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment() | dict(env or {}),
                cwd=ROOT,
            )
        self._stdin = cast("IO[str]", self._process.stdin)
        self._stdout = cast("IO[str]", self._process.stdout)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function of the side and wait for its result.

        Raises:
            SideError: It raised or ended.
        """
        self.send(function, **arguments)
        return self.receive()

    def send(self, function: str, **arguments: Any) -> None:
        """Call without waiting; `receive` gives the result."""
        try:
            self._stdin.write(json.dumps([function, arguments]) + "\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self) -> Any:
        """The result of the last `send`. Raises SideError."""
        line = self._stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def _ended(self) -> SideError:
        tail = self._log.read_text(errors="replace")[-2000:]
        return SideError(f"{self._process.args!r} ended with {self._process.poll()}:\n{tail}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment() -> dict[str, str]:
    """That of the benchmark, without settings of a router."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("KVROUTER_", "DYN_"))}
    path = [env.get("PYTHONPATH", ""), str(ROOT)]
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONHASHSEED": "0"}


def serve(functions: Sequence[Callable[..., Any]], run: Callable[[Any], Any] = asyncio.run) -> None:
    """Answer calls until standard input ends.

    Args:
        functions: What may be called, by their names.
        run: Runs the coroutine that does it, `uvloop.run` for instance.
    """
    run(_answer({function.__name__: function for function in functions}))


async def _answer(functions: Mapping[str, Callable[..., Any]]) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, arguments = json.loads(line)
        try:
            result = functions[name](**arguments)
            if inspect.isawaitable(result):
                result = await result
            answer = {"result": result}
        except Exception:  # noqa: BLE001 - the caller gets it
            answer = {"error": traceback.format_exc()}
        out.write(json.dumps(answer) + "\n")
        out.flush()
