"""Bindings of sessions: how long they last, and that they do not grow without bound."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter_grpc.routing.sessions import Sessions
from kvrouter_grpc.types import Target

TTL_S = 10.0
MOST = 4


class Bindings(RuleBasedStateMachine):
    """Against a plain list of (session, target, last use), the last used at its end."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.sessions = Sessions(TTL_S, MOST)
        self.model = []

    @rule(session=st.integers(0, 6), worker=st.integers(0, 2))
    def bind(self, session, worker):
        self.sessions.bind(session, Target(worker, 0), self.now)
        self.model = [entry for entry in self.model if entry[0] != session and entry[2] + TTL_S > self.now]
        self.model = [*self.model, (session, Target(worker, 0), self.now)][-MOST:]

    @rule(session=st.integers(0, 6))
    def find(self, session):
        alive = {key: target for key, target, used in self.model if used + TTL_S > self.now}
        assert self.sessions.find(session, self.now) == alive.get(session)

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def bounded(self):
        assert len(self.sessions) <= MOST


TestBindings = Bindings.TestCase
TestBindings.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
