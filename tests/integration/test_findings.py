"""What a running router says of workers that are not as they should be: the sentences of `kvrouter check`."""

import asyncio
from dataclasses import replace

import pytest

from integration.stack import FAST, Stack, admin_pb2, running
from integration.test_check import complete
from kvrouter_grpc.mock_worker import MockWorkerConfig

PROMPT = list(range(100, 140))


async def finding(stack: Stack, words: str) -> str:
    """The first finding with these words, once there is one."""
    found: list[str] = []
    try:
        async with asyncio.timeout(10):
            while True:
                found = list((await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())).findings)
                for each in found:
                    if words in each:
                        return each
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"no finding has {words!r}: {found}")


async def test_wrong_topic_shows_with_the_first_replay() -> None:
    async with running("a", specs={"a": {"topic": "kv@pod-7"}}) as stack:
        await complete(stack.workers["a"], PROMPT)
        said = await finding(stack, "topic")
    assert said == (
        "a: its events have the topic 'kv-events', so none passes the topic 'kv@pod-7' of its entry: "
        "correct topic= in its entry, or leave it out to take all"
    )


async def test_right_topic_says_nothing() -> None:
    async with running("a", specs={"a": {"topic": "kv-"}}) as stack:
        await stack.on("a", PROMPT)
        assert list((await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())).findings) == []


@pytest.mark.parametrize(
    ("worker", "says"),
    [
        (replace(FAST, prefix_caching=False), "runs without prefix caching"),
        (replace(FAST, kv_events=False), "publishes no KV events"),
        (replace(FAST, kv_event_sources=False), "does not say where its KV events are"),
    ],
)
async def test_settings_of_an_engine(worker: MockWorkerConfig, says: str) -> None:
    async with running("a", worker=worker, wait=False) as stack:
        assert (await finding(stack, says)).startswith("a: its engine ")


async def test_port_that_is_no_zeromq() -> None:
    async with running("a") as stack:
        url = stack.workers["a"].url.replace("http", "tcp")
        spec = admin_pb2.WorkerSpec(name="b", url=stack.workers["a"].url, endpoint=stack.router.endpoint, events=url)
        await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec))
        said = await finding(stack, "does not speak ZeroMQ")
    assert said == f"b: {url} does not speak ZeroMQ: is it the port of the KV events?"


async def test_blocks_that_are_stored_again_when_they_are_reused() -> None:
    small = replace(FAST, num_blocks=8)
    async with running("a", worker=small) as stack:
        for number in range(6):
            prompt = [200 + number] * 40
            for _ in range(2):  # the second time the blocks are merely reused, and told of again
                await complete(stack.workers["a"], prompt, vllm_xargs={"kv_cache_report_mode": "full"})
        said = await finding(stack, "merely reuses")
    assert "blocks in a cache of 8" in said
    assert "kv_cache_report_mode=full" in said
