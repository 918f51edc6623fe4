"""The paged KV cache of one rank: which physical block holds what, who uses it, and which is given up first.

A pure state machine with the rules of vLLM's block pool. They matter to a router because they decide what the events
say: the tail of a sequence is evicted before its head, a hit revives a freed block, the last block of a prompt that is
cached whole is computed again into a second physical block under the same hash, and every physical block that loses
its content is reported once.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvrouter_grpc.mock_worker.block_hash import CacheScope, block_hash, root_hash
from kvrouter_grpc.mock_worker.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent


@dataclass(slots=True)
class BlockTable:
    """The blocks of one request.

    Attributes:
        tokens: Prompt and output so far; the owner appends to it.
        scope: What keeps its blocks apart from equal tokens of others.
        session_id: Named in its events.
        blocks: Physical block per position.
        hashes: Hash per full block of `tokens`, as far as computed.
        registered: Leading blocks that are findable in the cache.
    """

    tokens: list[int]
    scope: CacheScope = field(default_factory=CacheScope)
    session_id: str | None = None
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    registered: int = 0


class BlockManager:
    """Allocates physical blocks, keeps freed ones for reuse by content, and records what happened as events."""

    def __init__(
        self, num_blocks: int, block_size: int, hash_seed: str = "vllm-none-hash", *, prefix_caching: bool = True
    ) -> None:
        """Set up an empty cache.

        Args:
            num_blocks: Physical blocks, block 0 (the null block) included, which is never given out.
            block_size: Tokens per block.
            hash_seed: Root of the hash chain.
            prefix_caching: Keep what was computed.
        """
        self._prefix_caching = prefix_caching
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._root = root_hash(hash_seed)
        self._references = [0] * num_blocks
        self._content: list[bytes | None] = [None] * num_blocks
        # Physical blocks per hash, oldest first: the oldest is the one that serves hits.
        self._cached: dict[bytes, list[int]] = {}
        # Blocks nobody uses, next victim first. They keep their content until they are given out again.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._events: list[KvEvent] = []

    @property
    def free_blocks(self) -> int:
        """Blocks that no request holds; they may still have reusable content."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that requests hold, 0 to 1."""
        return 1.0 - len(self._free) / (self.num_blocks - 1)

    @property
    def cached_blocks(self) -> int:
        """Physical blocks with reusable content, duplicates included."""
        return sum(map(len, self._cached.values()))

    def holds(self, digest: bytes) -> bool:
        """Whether a block of that hash would be a hit."""
        return digest in self._cached

    def take_events(self) -> list[KvEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def find_prefix(self, table: BlockTable) -> int:
        """Leading blocks of the table's tokens that are cached.

        The block with the last token never counts, because only computing that token yields the next one. So a
        prompt that is cached whole has its last block computed again.
        """
        self._extend_hashes(table)
        limit = (len(table.tokens) - 1) // self.block_size
        cached = self._cached
        hits = 0
        for digest in table.hashes[:limit]:
            if digest not in cached:
                break
            hits += 1
        return hits

    def admit(self, table: BlockTable, hits: int, num_tokens: int, *, report_hits: bool = False) -> bool:
        """Give a request without blocks its `hits` cached ones and new ones for the rest of `num_tokens` tokens.

        Nothing is given out unless the *whole* sequence fits now: a request that would be preempted before its
        prompt is computed is better left waiting.

        Args:
            table: A table without blocks.
            hits: From `find_prefix`, with nothing in between.
            num_tokens: Tokens computed by the end of this step, the cached ones included.
            report_hits: Store events for reused blocks, too (`kv_cache_report_mode: full`).

        Returns:
            False, with nothing changed, when the blocks do not suffice.
        """
        reused = [self._cached[digest][0] for digest in table.hashes[:hits]]
        revived = sum(1 for block in reused if not self._references[block])
        if self._blocks_for(len(table.tokens)) - hits + revived > len(self._free):
            return False
        for block in reused:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
        table.blocks.extend(reused)
        table.registered = hits
        if report_hits and hits:
            self._report_stored(table, 0, hits)
        self._give_out(table, num_tokens)
        return True

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens and register what that fills.

        Returns:
            False, with nothing changed, when the blocks do not suffice.
        """
        if self._blocks_for(num_tokens) - len(table.blocks) > len(self._free):
            return False
        self._give_out(table, num_tokens)
        return True

    def free(self, table: BlockTable) -> None:
        """Take a request's blocks back, tail first, so that its head is the last to be evicted.

        Blocks without reusable content go to the front of the queue: giving those out again costs nobody a hit.
        """
        for block in reversed(table.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            self._free[block] = None
            if self._content[block] is None:
                self._free.move_to_end(block, last=False)
        table.blocks.clear()
        table.registered = 0

    def reset(self) -> bool:
        """Forget all content. Refused (False) while a request holds blocks."""
        if len(self._free) != self.num_blocks - 1:
            return False
        self._cached.clear()
        self._content = [None] * self.num_blocks
        self._events.append(AllBlocksCleared())
        return True

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _extend_hashes(self, table: BlockTable) -> None:
        size = self.block_size
        hashes = table.hashes
        parent = hashes[-1] if hashes else self._root
        for index in range(len(hashes), len(table.tokens) // size):
            block = tuple(table.tokens[index * size : (index + 1) * size])
            parent = block_hash(parent, block, table.scope.hashed_keys(index))
            hashes.append(parent)

    def _give_out(self, table: BlockTable, num_tokens: int) -> None:
        for _ in range(self._blocks_for(num_tokens) - len(table.blocks)):
            block, _ = self._free.popitem(last=False)
            self._evict(block)
            self._references[block] = 1
            table.blocks.append(block)
        full = num_tokens // self.block_size
        if self._prefix_caching and full > table.registered:
            self._register(table, full)

    def _evict(self, block: int) -> None:
        digest = self._content[block]
        if digest is None:
            return
        self._content[block] = None
        holders = self._cached[digest]
        holders.remove(block)
        if not holders:
            del self._cached[digest]
        self._events.append(BlockRemoved(digest))

    def _register(self, table: BlockTable, full: int) -> None:
        self._extend_hashes(table)
        first = table.registered
        for block, digest in zip(table.blocks[first:full], table.hashes[first:full], strict=True):
            self._content[block] = digest
            self._cached.setdefault(digest, []).append(block)
        table.registered = full
        self._report_stored(table, first, full)

    def _report_stored(self, table: BlockTable, first: int, last: int) -> None:
        size, scope = self.block_size, table.scope
        self._events.append(
            BlockStored(
                hashes=tuple(table.hashes[first:last]),
                parent=table.hashes[first - 1] if first else None,
                tokens=table.tokens[first * size : last * size],
                block_size=size,
                lora_id=scope.lora_id,
                lora_name=scope.lora_name,
                extra_keys=[scope.event_keys(index) for index in range(first, last)],
                session_id=table.session_id,
            )
        )
