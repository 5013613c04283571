"""The stages of batch normalization, fast. Arrays in, outputs passed in last, nothing returned; no framework."""
