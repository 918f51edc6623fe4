"""What engines tell back: how busy they are, and what they found of the prompts that were sent to them.

It corrects what the router assumes: the load that came from elsewhere, what is predicted to be cached, and how far a
picture is to be trusted.
"""

from array import array

from kvrouter_grpc.core import Decider
from kvrouter_grpc.routing.forecast import Prediction
from kvrouter_grpc.routing.foreign import ForeignLoad
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.loads import Lease, LoadTable
from kvrouter_grpc.types import Decision, EngineReport, Prompt, Target

NEW_BLOCKS = 2
"""Full blocks still to be computed from which on an event is due: an engine that finds a prompt as a whole computes its
last block again, and need not tell."""


class Feedback:
    """Takes in what the engines of an endpoint tell. Of a target that was removed everything is ignored.

    Args:
        index: What they hold.
        loads: What is booked on them.
        decider: Knows what requests usually have to compute.
    """

    def __init__(self, index: KvIndex, loads: LoadTable, decider: Decider) -> None:
        self._index = index
        self._loads = loads
        self._decider = decider
        self._foreign = ForeignLoad(index.targets)
        self._reports: dict[Target, EngineReport] = {}

    # --- of an engine -----------------------------------------------------------------------------------------------

    def engine_reported(self, target: Target, report: EngineReport) -> None:
        """Take what a rank says of its work."""
        hits = self._index.hits(target)
        if hits is not None:
            self._reports[target] = report
            hits.reported(report)
            self._foreign.reported(target, report, self._decider.usual_new_tokens, self._loads.clock())
            self._loads.relieved()

    def engine_report(self, target: Target) -> EngineReport | None:
        """The last report of a rank, if there was one."""
        return self._reports.get(target)

    def engine_restarted(self, target: Target) -> None:
        """Forget what the rank held: its process is another one now."""
        self._index.clear(target)
        self.forget(target)

    def forget(self, target: Target) -> None:
        """Forget what the rank said."""
        self._reports.pop(target, None)
        self._foreign.forget(target)

    def fade(self, now: float) -> None:
        """Let what silent engines said count less."""
        self._foreign.fade(self._decider.usual_new_tokens, now)

    def resync_due(self, target: Target) -> bool:
        """Whether the picture of `target` foretells so badly that it should be fetched again, now; says yes once."""
        hits = self._index.hits(target)
        return hits is not None and hits.resync_due(self._loads.clock())

    # --- of a request -----------------------------------------------------------------------------------------------

    def booked(self, lease: Lease, seqs: "array[int]", prompt: Prompt) -> None:
        """A request was booked: note what its answer is to be compared with.

        Args:
            lease: Its booking.
            seqs: Sequence hashes of its prompt.
            prompt: The prompt.
        """
        now, target = self._loads.clock(), lease.decision.target
        lease.prediction = self._index.predict(target, seqs, prompt, now)
        hits = self._index.hits(target)
        if hits is not None:
            lease.expectation = hits.expect(lease.decision, now)

    def first_token(self, lease: Lease) -> None:
        """The prompt of a request that was sent is computed: its blocks are announced or overdue soon. Idempotent."""
        if not lease.prefilling:
            return
        lease.first_token()
        target, expected = lease.decision.target, lease.expectation
        stream, hits = self._index.stream_if_known(target), self._index.hits(target)
        if stream is None or hits is None or expected is None or expected.epoch != hits.epoch:
            return
        hits.computed(expected)
        if expected.new_blocks >= NEW_BLOCKS and stream.last_event_at < expected.booked_at:
            stream.prompts.computed(expected.booked_at, self._loads.clock())

    def answered(self, lease: Lease, cached_tokens: int | None) -> None:
        """A booked request was answered completely; compare what its engine found with what was expected.

        Args:
            lease: Its booking.
            cached_tokens: As its engine reported, None when it did not.
        """
        target, expected = lease.decision.target, lease.expectation
        stream, hits = self._index.stream_if_known(target), self._index.hits(target)
        if stream is None or hits is None or expected is None:
            return
        hits.finished(expected, cached_tokens)
        if stream.prompts and cached_tokens is not None and cached_tokens > expected.likely:
            stream.prompts.excuse(expected.booked_at)

    def improve(self, prediction: Prediction, prompt: Prompt, decision: Decision) -> None:
        """Correct predictions by what was heard of a request that is about to be released."""
        cached_tokens, answer = prediction.cached_tokens, prediction.answer
        if cached_tokens is not None and cached_tokens < decision.expected_cached_tokens:
            prediction.correct(cached_tokens // decision.block_size)
        if answer:
            # Nothing was generated from the last token, so its keys and values were never computed.
            tokens = array("I", (*prompt.tokens.tolist(), *answer[:-1]))
            prediction.lengthen(self._index.sequence(prompt._replace(tokens=tokens)))
