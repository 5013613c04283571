"""The stages of batch normalization, fast: arrays in, outputs passed last, nothing returned, no framework."""
