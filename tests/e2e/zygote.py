"""Import one vLLM once, then fork engines from the warm process: an engine is up in 3 s instead of 13, and again after a kill.

    PYTHONPATH=<folder of a vLLM> python zygote.py

Runs with the Python of the engines and knows nothing of the tests. Commands are JSON lines on stdin, each answered by
one JSON line on stdout; the end of stdin kills every engine.

    {"do": "start", "name": N, "log": PATH, "arguments": [...], "environment": {...}}   -> {"pid": P}
    {"do": "poll", "name": N}                                  -> {"exit": null while it runs, else its exit status}
    {"do": "stop", "name": N, "number": SIGNAL}                         -> {"exit": status}
    {"do": "signal", "name": N, "number": SIGNAL}              -> {}, all of its processes got it

vLLM starts its engine core by spawning a fresh interpreter, because forking with CUDA or with running threads is unsafe.
Here neither exists before the fork, so `fork` is put in its place, and the core starts warm as well.
"""

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from typing import Any

PR_SET_PDEATHSIG = 1
STOP_GRACE_S = 5.0
libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Whatever kills the parent kills this process: a killed test run leaves no engine behind."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def preload() -> None:
    """Import all that an engine imports, and let vLLM fork."""
    for module in (
        "vllm.entrypoints.openai.api_server",
        "vllm.model_executor.models.llama",
        "vllm.v1.core.sched.scheduler",
        "vllm.v1.engine.async_llm",
        "vllm.v1.executor.uniproc_executor",
        "vllm.v1.worker.cpu_worker",
    ):
        importlib.import_module(module)
    from vllm.model_executor.models import registry
    from vllm.v1.engine import coordinator, utils

    for starter in (coordinator, utils):  # the two that start processes
        starter.get_mp_context = lambda: multiprocessing.get_context("fork")
    # Looking at a model class needs no fresh interpreter either, which would import all of this again.
    registry._run_in_subprocess = lambda look: look()
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def serve(log: str, arguments: list[str]) -> None:
    """Become one engine: the body of `vllm serve`, in a session of its own so that a signal reaches all of it."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    import uvloop
    from vllm.entrypoints.openai.api_server import run_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        cli_args = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    except ModuleNotFoundError:  # before 0.32
        cli_args = importlib.import_module("vllm.entrypoints.openai.cli_args")
    options = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    cli_args.validate_parsed_serve_args(options)
    uvloop.run(run_server(options))


class Nursery:
    """The engines that were forked, by name."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}  # still running, as far as is known
        self._exits: dict[str, int] = {}

    def start(self, name: str, log: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
        """Fork one engine."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ.update(environment)  # vLLM reads its variables when it needs them
                serve(log, arguments)
                status = 0
            except BaseException:  # noqa: BLE001 - the log is the only place left to tell
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        self._pids[name] = pid
        self._exits.pop(name, None)
        return {"pid": pid}

    def poll(self, name: str) -> dict[str, Any]:
        """The exit status once the engine is gone."""
        if (pid := self._pids.get(name)) is not None:
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                del self._pids[name]
                self._exits[name] = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what a crash of the API server left of its session
        return {"exit": self._exits.get(name)}

    def stop(self, name: str, number: int) -> dict[str, Any]:
        """End one engine and wait for it: SIGKILL hits all its processes at once, SIGTERM asks its API server."""
        if (pid := self._pids.get(name)) is not None:
            (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)
            deadline = time.monotonic() + STOP_GRACE_S
            while self.poll(name)["exit"] is None:
                if time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
                time.sleep(0.01)
        return self.poll(name)

    def signal(self, name: str, number: int) -> dict[str, Any]:
        """Send a signal to all processes of an engine."""
        os.killpg(self._pids[name], number)
        return {}

    def close(self) -> None:
        """Kill what is left."""
        for name in list(self._pids):
            self.stop(name, signal.SIGKILL)


def main() -> None:
    """Serve commands until stdin ends."""
    warnings.filterwarnings("ignore")
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    preload()
    answers.write(json.dumps({"ready": True}) + "\n")
    nursery = Nursery()
    try:
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(nursery, command.pop("do"))(**command)
            answers.write(json.dumps(answer) + "\n")
    finally:
        nursery.close()


if __name__ == "__main__":
    main()
