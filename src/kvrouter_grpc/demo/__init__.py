"""`kvrouter demo`: the router over embedded mock workers, with a small multi-turn workload, shown live."""
