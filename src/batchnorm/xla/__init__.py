"""Batch normalization as primitives of JAX, which XLA computes on a CPU by our kernels: for JAX, and for Keras."""
