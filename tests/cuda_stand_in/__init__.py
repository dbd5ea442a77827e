"""A CPU that vLLM takes for a CUDA device: its GPU worker, start-up and graphs, in a process apart.

`device` stands in for the device, `operators` for CUDA's operators, `graphs` for its graphs;
`serve` starts engines on it. Triton's kernels, vLLM's and ours, run in Triton's interpreter.
"""
