"""Random event streams in every form that engines have sent, with few names and tokens.

So duplicates, aliases, conflicts, shared prefixes and late parents are common; now and then a field is broken.
"""

from msgspec.msgpack import encode

SIZE = 2  # tokens per block
GROUPS = [("full_attention", 1, None), ("sliding_window", 2, 9), ("mamba", 3, None), ("full_attention", 2, None)]
STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
)
REMOVED = ("block_hashes", "medium", "group_idx", "locality")
HEX = "00ff00ff00ff00ff" + "ab" * 24
KEYS = ["salt", "salt", "a", "a", "", HEX, "é", ["image", 3], ["image", -3], [HEX, 0], ["image"], 7, None, b"digest"]
ODD = [None, 0, -1, 2**64 - 1, 1.5, True, "text", b"bytes", [], {}, [[1]], {"a": 1}, [-1], ["x"], [2**32]]


class Stream:
    """Writes messages.

    Args:
        rng: Source of chance.
        trouble: Share of fields that are broken, missing, doubled or unknown.
        names: How many engine hashes there are.
        hybrid: Events of several KV cache groups, whose blocks differ in size.
    """

    def __init__(self, rng, trouble=0.0, names=24, hybrid=False):
        self.rng, self.trouble, self.names, self.hybrid = rng, trouble, names, hybrid

    def message(self):
        rng = self.rng
        kinds = [self.stored, self.stored, self.stored, self.removed, self.removed, self.cleared]
        weights = [30, 30, 30, 30, 30, 1]
        events = array_of(write() for write in rng.choices(kinds, weights, k=rng.randrange(4)))
        ts, rank = self.value(1.5), self.value(rng.choice([0, None]))
        if rng.random() < 0.7:
            return array_of([ts, events, rank][: rng.choice([2, 3, 3])])
        return map_of([("ts", ts), ("events", events), ("data_parallel_rank", rank)])

    def value(self, usual):
        return encode(self.rng.choice(ODD) if self.rng.random() < self.trouble else usual)

    def name(self):
        value = self.rng.randrange(self.names)
        return self.rng.choice([value, value, value, value.to_bytes(8), b"\x01" * 24 + value.to_bytes(8)])

    def stored(self):
        rng = self.rng
        names = [self.name() for _ in range(rng.choice([1, 1, 2, 3, 6]))]
        blocks = max(0, len(names) + rng.choice([0] * 20 + [-1, 1]))
        # One token decides a block: prefixes are shared as often as possible.
        values = [token for _ in range(blocks) for token in [rng.choice([1, 1, 1, 200, 40_000, 2**32 - 1])] * SIZE]
        extra = rng.choice([None, [None] * len(names)])
        if rng.random() < 0.1:
            extra = [rng.choice([None, None, rng.choices(KEYS, k=rng.randrange(3))]) for _ in names]
        event = {
            "block_hashes": names,
            "parent_block_hash": rng.choice([None, self.name()]),
            "token_ids": rng.choice([values] * 20 + [[], None, values[1:]]),
            "block_size": rng.choice([SIZE] * 40 + [0, None, SIZE + 1]),
            "lora_id": rng.choice([None] * 20 + [7, -7, 2**64 - 1]),
            "medium": rng.choice([None, "GPU", "GPU", "GPU", "GPU", "GPU", "cpu", "DISK", "OBJ"]),
            "lora_name": rng.choice([None] * 20 + ["a", "a", "", "é"]),
            "extra_keys": extra,
            "group_idx": rng.choice([0] * 20 + [None, 1, 63]),
            "kv_cache_spec_kind": rng.choice([None, "full_attention"] * 10 + ["sliding_window", "mla_attention"]),
            "kv_cache_spec_sliding_window": None,
            "locality": rng.choice([None] * 20 + ["LOCAL", "REMOTE"]),
        }
        if self.hybrid and rng.random() < 0.9:
            self.of_a_group(event, blocks)
        return self.event("BlockStored", STORED, event)

    def of_a_group(self, event, blocks):
        rng = self.rng
        group = rng.randrange(len(GROUPS))
        kind, width, window = GROUPS[group]
        size = width * SIZE if rng.random() < 0.97 else SIZE
        if width > 1:
            event["token_ids"] = [
                token for _ in range(blocks * size // SIZE) for token in [rng.choice([1, 1, 2])] * SIZE
            ]
        if rng.random() < 0.2:  # named by hash alone: fewer names than the tokens have blocks
            event["token_ids"] = [1] * size * (len(event["block_hashes"]) + 1)
        event.update(
            block_size=size, group_idx=group, kv_cache_spec_kind=kind, kv_cache_spec_sliding_window=window, medium="GPU"
        )

    def removed(self):
        rng = self.rng
        event = {
            "block_hashes": [self.name() for _ in range(rng.randrange(4))],
            "medium": rng.choice([None, "GPU", "GPU", "GPU", "CPU", "DISK", "OBJ"]),
            "group_idx": rng.choice([0] * 20 + [None, 1, 63]),
            "locality": rng.choice([None] * 20 + ["LOCAL", "REMOTE"]),
        }
        if self.hybrid:
            event["group_idx"] = rng.randrange(len(GROUPS))
        return self.event("BlockRemoved", REMOVED, event)

    def cleared(self):
        return self.event("AllBlocksCleared", (), {})

    def event(self, kind, fields, event):
        rng = self.rng
        values = [(name, self.value(event[name])) for name in fields]
        troubled = rng.random() < self.trouble
        if rng.random() < 0.5:
            length = rng.randrange(len(values) + 1) if troubled else len(values)
            later = [encode({"later": 1})] if rng.random() < 0.05 else []
            return array_of([encode(kind), *(value for _, value in values[:length]), *later])
        pairs = [("type", encode(kind)), *values]
        if rng.random() < 0.05:
            rng.shuffle(pairs)
        if rng.random() < 0.05:
            pairs.append(("later", encode({"nested": [1, b"x", None, 1.5, -200]})))
        if troubled:
            what = rng.randrange(3)
            if what == 0:
                pairs.append(rng.choice(pairs))
            elif what == 1:
                pairs.remove(rng.choice(pairs))
            else:
                pairs.append(("type", encode(rng.choice(["BlockMoved", "BlockRemoved", 5]))))
        return map_of(pairs)


def array_of(items):
    items = list(items)
    return b"\xdc" + len(items).to_bytes(2) + b"".join(items)


def map_of(pairs):
    return b"\xde" + len(pairs).to_bytes(2) + b"".join(encode(key) + value for key, value in pairs)
