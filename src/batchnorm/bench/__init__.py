"""How fast a normalization is on this machine: ours, PyTorch's, other frameworks', and a plain copy of the tensor.

`cases` says what is timed, `clock` how, `layers` what runs against what; `peers` is other frameworks, `environment`
what a number means nothing without, `table` records as CSV, `summary` what follows from them, and `terminal` is all of
it as one command. It needs `pip install "batchnorm[study]"`.
"""
