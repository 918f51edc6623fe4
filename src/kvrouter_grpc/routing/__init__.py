"""The decision: what every worker holds, what it is busy with, and where the next request goes.

Nothing here awaits, so a decision and its booking are one step between two turns of the event loop, without locks.
"""
