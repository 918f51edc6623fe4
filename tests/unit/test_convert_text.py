"""Text to token ids."""

import asyncio
import sys
import threading
from array import array

import pytest

from integration.server_rig import until
from kvrouter_grpc.errors import ConfigError, OverloadedError
from kvrouter_grpc.server import tokenizer
from kvrouter_grpc.server.tokenizer import Tokenizer


async def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError) as caught:
        Tokenizer(tmp_path)
    assert "pip install 'kvrouter-grpc[tokenizer]'" in caught.value.faults[0]


async def test_a_path_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.faults[0]


async def test_texts_are_encoded_off_the_loop_and_bounded(monkeypatch, tmp_path):
    threads = set()
    gate = threading.Event()

    def encode(text):
        threads.add(threading.current_thread().name)
        assert gate.wait(10)
        return array("I", list(text.encode()))

    monkeypatch.setattr(tokenizer, "_load", lambda _: encode)
    monkeypatch.setattr(tokenizer, "MAX_WAITING", 2)
    words = Tokenizer(tmp_path)
    waiting = [words.encode(text) for text in ("a", "bc", "d")]
    first, second = (await_later(coroutine) for coroutine in waiting[:2])
    await settled_in(words, 2)
    with pytest.raises(OverloadedError) as caught:
        await waiting[2]
    assert caught.value.retry_after_s
    gate.set()
    assert [await first, await second] == [array("I", [97]), array("I", [98, 99])]
    await settled_in(words, 0)
    assert await words.encode("e") == array("I", [101])
    assert threading.current_thread().name not in threads
    words.close()


def await_later(coroutine):
    return asyncio.get_running_loop().create_task(coroutine)


async def settled_in(words, waiting):
    await until(lambda: len(words._waiting) == waiting)
