"""Callbacks, one idea a file."""
