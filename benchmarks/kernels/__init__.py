"""The Triton kernels in one command: right without a GPU, fast on one.

`launches.py` owns their launches at real shapes and the compilation of these without a device;
`head.py` what the fused head is measured at and against; `__main__.py` the
command.
"""
