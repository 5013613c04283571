"""The GPU kernels: checked against float64 on the device, and timed against PyTorch.

`python -m benchmarks.gpu` runs the parts one after the other: `checks`, `copies`, `layers`, `host`, `models`, and the
`sweep` over the tuning table. `session` keeps what all parts share, `workers` the processes that compile kernels and
check them, and `clock` the ways to time work on a GPU.
"""
