"""What batch normalization does, measured: networks with it, without it and with alternatives, from many seeds.

In the order of imports: `settings` sets the size of the study, `data` reads the images, `tasks` defines tasks and their
runs, `networks` builds the networks, `training` trains them, `measures` records more than curves, `runner` runs all
tasks in parallel and keeps the results, `verdicts` is the rule, `claims` apply it, `figures` draws, `experiments`
combine these, `summary` says what was learned, `report` writes the texts, `output` writes the files, and `terminal` is
the command. The package needs `pip install "batchnorm[study]"`.
"""

from batchnorm.extras import require

require("study")
