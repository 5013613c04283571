"""Tools for whole models, written once for all frameworks."""
