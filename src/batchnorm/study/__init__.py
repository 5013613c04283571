"""What batch normalization does, measured: the same network trained with it and without it, over many seeds.

`data` reads the images, `experiments` trains and returns records, `claims` says what follows from them, `report` and
`figures` show it, `output` writes the files, and `terminal` is all of it as one command. It needs
`pip install "batchnorm[study]"`.
"""
