"""Instruments that measure models made with `ldlm`."""
