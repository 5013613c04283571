"""Batch normalizations in files of weights, read without running any code that is in them."""
