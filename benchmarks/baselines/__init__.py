"""Drafters of other methods for the same target: what AdaDecode's heads are compared with.

All learn from the same text for the same number of tokens as the demo's heads, towards the same
goal, the target's own distribution.
"""
