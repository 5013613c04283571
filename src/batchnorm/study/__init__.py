"""What batch normalization does, measured: networks with it, without it and with alternatives, from many seeds.

From what is imported to what imports: `settings` says how much, `data` reads the images, `tasks` are what is to be
done and what came of it, `networks` are trained by `training` and looked at by `measures`, `runner` does it all in
parallel and keeps it, `verdicts` is the rule, `claims` apply it, `figures` draw, `experiments` put these together,
`report` writes, `output` makes the files, and `terminal` is all of it as one command. It needs
`pip install "batchnorm[study]"`.
"""
