"""The speed of normalizations on this machine: ours, PyTorch's, other frameworks', and a plain copy of the tensor.

`cases` lists what is timed, `clock` times it, and `layers` builds the candidates; `peers` adds other frameworks.
`table` reads and writes CSV, `summary` computes means and ratios, and `terminal` is the command. The package needs
`pip install "batchnorm[bench]"`.
"""

from batchnorm.extras import require

require("bench")
