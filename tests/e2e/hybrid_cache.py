"""vLLM's own cache manager with several KV cache groups, driven by random requests, without an engine around it.

    PYTHONPATH=<folder of a vLLM> python hybrid_cache.py [requests]  >  lines of JSON

Every kind of model below is a configuration of groups as vLLM makes it for such a model. Written are the event
messages, as the engine encodes them, and now and then how many tokens of a prompt the manager finds cached:

    {"model": name, "groups": [[kind, block size, window], ...]}
    {"payload": hex}
    {"prompt": [token, ...], "images": [[id, offset, length], ...], "salt": text, "lora": name, "cached_tokens": n}
"""

import json
import random
import sys
from math import gcd, lcm
from typing import NamedTuple

import msgspec
import torch
from vllm.distributed.kv_events import KVEventBatch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

HEADS = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
TOKENS = 3  # a small alphabet: prompts meet often
LONGEST = 400


class Prompt(NamedTuple):
    tokens: list
    images: list
    salt: str | None
    lora: str | None


def full(block):
    return ["full_attention", block, None]


def sliding(block, window):
    return ["sliding_window", block, window]


def mamba(block):
    return ["mamba", block, None]


MODELS = {
    "one full group": [full(16)],
    "full and sliding": [full(16), sliding(16, 64)],
    "sliding first": [sliding(16, 40), sliding(16, 40), full(16)],
    "two windows": [sliding(16, 33), full(16), sliding(16, 128)],
    "sliding alone": [sliding(16, 64)],
    "states": [full(16), mamba(16), mamba(16)],
    "wide windows": [full(16), sliding(32, 64)],
    "wide full attention": [sliding(16, 64), full(32)],
    "all wide": [full(32), sliding(48, 100)],
}
KEYED = "images, salts and adapters"  # one group; what is hashed into its blocks beside the tokens differs
MODELS[KEYED] = [full(16)]
# Later releases tag what they hash; before, a salt spelled like the adapter was the same as no salt and the adapter.
SALTS = ["tenant", "blue" if hasattr(kv_cache_utils, "to_event_extra_keys") else "another"]
IMAGES = ["ab" * 32, "Cd" * 32, "an image of the user's own name"]


def spec_of(kind, block, window):
    if kind == "mamba":
        return MambaSpec(block_size=block, shapes=((2,),), dtypes=(torch.float32,), mamba_cache_mode="align")
    if kind == "sliding_window":
        return SlidingWindowSpec(block_size=block, sliding_window=window, **HEADS)
    return FullAttentionSpec(block_size=block, **HEADS)


def manager_of(groups, blocks):
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([f"layer{i}"], spec_of(*group)) for i, group in enumerate(groups)],
    )
    sizes = [block for _, block, _ in groups]
    manager = KVCacheManager(
        config,
        max_model_len=2 * LONGEST,
        scheduler_block_size=lcm(*sizes),
        hash_block_size=gcd(*sizes),
        enable_kv_cache_events=True,
    )
    return manager, get_request_block_hasher(gcd(*sizes), sha256), lcm(*sizes)


class Session:
    """Requests of one model: they begin like earlier ones, are computed in chunks and answer a little."""

    def __init__(self, name, seed, requests):
        self.rng = random.Random(f"{name} {seed}")
        self.groups = MODELS[name]
        self.manager, self.hasher, self.step = manager_of(self.groups, self.rng.choice([60, 90, 200]))
        self.keyed = name == KEYED
        self.seen = [Prompt([], [], None, None)]
        self.running = []
        self.prompts = {}
        self.number = 0
        write({"model": name, "groups": self.groups})
        for _ in range(requests):
            self.begin()
            while len(self.running) > 2 or (self.running and self.rng.random() < 0.5):
                self.advance(self.rng.choice(self.running))
            self.ask()

    def prompt(self):
        rng = self.rng
        known = rng.choice(self.seen[-30:])
        keep = rng.randint(0, len(known.tokens))
        tokens = (known.tokens[:keep] + [rng.randrange(TOKENS) + 1] * rng.randint(1, 120))[:LONGEST]
        if not self.keyed:
            return Prompt(tokens, [], None, None)
        images = [image for image in known.images if image[1] + image[2] <= keep]
        while rng.random() < 0.5 and (left := len(tokens) - keep) > 0:
            images.append((rng.choice(IMAGES), keep + rng.randrange(left), rng.randint(1, left)))
            keep = images[-1][1] + images[-1][2]
        images = [(identifier, at, min(length, len(tokens) - at)) for identifier, at, length in images]
        if rng.random() < 0.8:
            return Prompt(tokens, images, known.salt, known.lora)
        return Prompt(tokens, images, rng.choice([None, *SALTS]), rng.choice([None, "blue"]))

    def request(self, prompt):
        self.number += 1
        request = Request(
            request_id=str(self.number),
            prompt_token_ids=prompt.tokens,
            sampling_params=SamplingParams(max_tokens=64),
            pooling_params=None,
            mm_features=[
                MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(at, length))
                for identifier, at, length in prompt.images
            ],
            lora_request=LoRARequest(prompt.lora, 1, "/adapters") if prompt.lora else None,
            cache_salt=prompt.salt,
            block_hasher=self.hasher,
        )
        self.prompts[request.request_id] = prompt
        return request

    def begin(self):
        request = self.request(self.prompt())
        blocks, cached, *_ = self.manager.get_computed_blocks(request)
        left = request.num_tokens - cached
        # States are kept where a chunk ends, so the scheduler of such models ends chunks on block boundaries.
        chunk = self.rng.choice([left, self.step, 3 * self.step])
        if self.manager.allocate_slots(request, min(chunk, left), cached, blocks) is None:
            return
        request.num_computed_tokens = cached + min(chunk, left)
        self.running.append(request)
        self.publish()

    def advance(self, request):
        left = request.num_tokens - request.num_computed_tokens
        if left == 0:
            if self.rng.random() < 0.2 or request.num_tokens >= LONGEST:
                self.finish(request)
                return
            request.append_output_token_ids(self.rng.randrange(TOKENS) + 1)
            left = 1
        chunk = min(left, self.rng.choice([left, self.step, 3 * self.step]))
        if self.manager.allocate_slots(request, chunk) is None:
            self.finish(request)
            return
        request.num_computed_tokens += chunk
        self.publish()

    def finish(self, request):
        self.running.remove(request)
        self.seen.append(self.prompts[request.request_id]._replace(tokens=list(request.all_token_ids)))
        self.manager.free(request)
        if self.rng.random() < 0.01 and not self.running:
            self.manager.reset_prefix_cache()
        self.publish()

    def publish(self):
        self.manager.new_step_starts()
        events = self.manager.take_events()
        if events:
            batch = KVEventBatch(ts=1.5, events=events, data_parallel_rank=0)
            write({"payload": msgspec.msgpack.encode(batch).hex()})

    def ask(self):
        prompt = self.prompt()
        _, cached, *_ = self.manager.get_computed_blocks(self.request(prompt))
        line = {"prompt": prompt.tokens, "images": prompt.images, "salt": prompt.salt, "lora": prompt.lora}
        write({key: value for key, value in line.items() if value} | {"cached_tokens": cached})


def write(line):
    sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    init_none_hash(sha256)
    for model in MODELS:
        Session(model, 1, int(sys.argv[1]) if len(sys.argv) > 1 else 300)
