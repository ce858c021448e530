"""Whole boards on a network of their own: see :mod:`lan.bed`."""
