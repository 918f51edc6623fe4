"""Hybrid models: what vLLM's own cache manager found cached, and what the router foretold from its events."""

import json

from contract.hybrid import hits_by_model, payloads, recorded
from reference.feeds import FeedPair


def test_every_hit_is_foretold() -> None:
    found = hits_by_model(recorded())
    assert len(found) == 10
    assert {model: counts["wrong"] for model, counts in found.items()} == dict.fromkeys(found, 0)
    assert all(counts["cached"] >= 5 for counts in found.values()), found


def test_the_twin_agrees() -> None:
    models = []
    for line in recorded():
        if "model" in json.loads(line):
            models.append([])
        models[-1].append(line)
    for model in models:
        pair = FeedPair(targets=1)
        for payload in payloads(model):
            pair.apply(0, payload)
        pair.finish()
