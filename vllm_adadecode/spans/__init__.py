"""One span of layers for part of a batch, in the target's own KV cache.

`ragged` takes any batch of the host's; `padded` has fixed shapes, for the loop on the device.
"""
