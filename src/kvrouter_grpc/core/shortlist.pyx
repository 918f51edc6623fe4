"""`Shortlist`: the rows among which a decision chooses."""

cimport cython
from cpython cimport array as c_array


@cython.final
@cython.freelist(16)
@cython.no_gc  # of what it refers to nothing refers to it
cdef class Shortlist:
    """The rows among which a decision chooses; the full description is in `shortlist.pyi`."""

    def __init__(self, c_array.array rows not None, occasion=None, c_array.array preferences=None):
        if rows.typecode != "I":
            raise ValueError(f"rows must be an array('I'), not of {rows.typecode!r}")
        if preferences is not None and preferences.typecode != "d":
            raise ValueError(f"preferences must be an array('d'), not of {preferences.typecode!r}")
        self.rows = rows
        self.occasion = occasion
        self.preferences = preferences
