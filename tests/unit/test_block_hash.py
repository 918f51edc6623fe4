"""Hashes against the published vectors and an independent implementation of XXH3."""

import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from kvrouter_grpc.core import hash_blocks, hash_bytes, hash_sequence, seed_for, sequence_hashes
from reference.radix import chain, local_hash

TOKENS = array("I", range(1, 33))


def test_vectors_of_blocks_and_sequences():
    assert list(hash_blocks(TOKENS, 16)) == [16863443419780771464, 2287610619914608821]
    assert list(hash_sequence(TOKENS, 16)) == [16863443419780771464, 12466389667045779788]


@pytest.mark.parametrize(
    ("lora", "salt", "seed", "first"),
    [
        ("", "", 1337, 16863443419780771464),
        ("adapter-a", "", 8842669519798868182, 4377081107200288488),
        ("", "tenant-a", 1948188790972764086, 8175209796170318505),
        ("adapter-a", "tenant-a", 10790858310771630931, 6479329714943191495),
    ],
)
def test_vectors_of_adapters_and_tenants(lora, salt, seed, first):
    assert seed_for(lora, salt) == seed
    assert hash_blocks(TOKENS, 16, seed)[0] == first


def test_vector_of_multimodal_blocks():
    assert hash_blocks(TOKENS, 16, 1337, {0: (5, 3)})[0] == 14035768524119421418


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 15, 16, 17, 32, 60, 61, 64, 128, 1024])
def test_agrees_with_an_independent_implementation(block_size):
    rng = random.Random(block_size)
    tokens = array("I", (rng.randrange(1 << 32) for _ in range(block_size * 9 + block_size // 2)))
    seed = rng.randrange(1 << 64)
    mm = {1: (7, 1 << 63), 4: tuple(rng.randrange(1 << 64) for _ in range(100)), 9: (1,), 5: ()}
    for mm_hashes in (None, mm):
        expected = [
            local_hash(tokens[i * block_size : (i + 1) * block_size], seed, (mm_hashes or {}).get(i, ()))
            for i in range(9)
        ]
        local = hash_blocks(tokens, block_size, seed, mm_hashes)
        assert local.typecode == "Q"
        assert list(local) == expected
        assert list(sequence_hashes(local)) == chain(expected)
        assert hash_sequence(tokens, block_size, seed, mm_hashes) == sequence_hashes(local)


def test_takes_any_buffer_without_copying_rules():
    data = b"\0" + TOKENS.tobytes()
    unaligned = memoryview(data)[1:].cast("I")  # as a token field inside a protobuf message would be
    assert hash_blocks(unaligned, 16) == hash_blocks(TOKENS, 16)
    assert hash_blocks(memoryview(TOKENS), 16) == hash_blocks(TOKENS, 16)


def test_partial_tail_is_dropped_and_nothing_is_fine():
    assert hash_sequence(TOKENS[:31], 16) == hash_sequence(TOKENS, 16)[:1]
    assert hash_sequence(array("I"), 16) == array("Q")
    assert sequence_hashes(array("Q")) == array("Q")
    assert hash_bytes(b"") == 3244421341483603138  # XXH3-64 of nothing, as published by its author


@pytest.mark.parametrize("block_size", [0, -1, (1 << 20) + 1, 1.5, "16", None])
def test_block_size_out_of_range(block_size):
    with pytest.raises(ValueError, match="block_size"):
        hash_blocks(TOKENS, block_size)


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.0, None])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed"):
        hash_sequence(TOKENS, 16, seed)


@pytest.mark.parametrize(
    "mm_hashes", [{-1: [1]}, {"0": [1]}, {0: [-1]}, {0: [1 << 64]}, {0: ["x"]}, {0: [1, "x"]}, {0: [1.5]}, {0: 3}]
)
def test_multimodal_hashes_out_of_range(mm_hashes):
    with pytest.raises(ValueError, match="mm_hashes"):
        hash_blocks(TOKENS, 16, 1337, mm_hashes)


@pytest.mark.parametrize("tokens", [array("Q", [1]), array("i", [1]), [1, 2], b"abcd", None, array("f", [1])])
def test_tokens_of_another_type(tokens):
    with pytest.raises((TypeError, ValueError)):
        hash_blocks(tokens, 1)


def test_names_that_are_not_text():
    with pytest.raises(TypeError):
        seed_for(None, "")
    with pytest.raises(ValueError, match="surrogates"):
        seed_for("\ud800", "")


def test_an_unbuilt_core_says_how_to_build_it(tmp_path):
    source = Path(__file__).parents[2] / "src/kvrouter_grpc/core/__init__.py"
    (tmp_path / "kvrouter_grpc/core").mkdir(parents=True)
    (tmp_path / "kvrouter_grpc/__init__.py").touch()
    (tmp_path / "kvrouter_grpc/core/__init__.py").write_text(source.read_text())
    run = subprocess.run(
        [sys.executable, "-c", "import kvrouter_grpc.core"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "ImportError" in run.stderr
    assert "make build" in run.stderr
