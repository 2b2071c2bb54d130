"""Samples of a trained network, and measures of their quality.

`sampling` draws samples, `likelihoods` bounds the likelihood of data, `features` defines named
spaces in which `distances` between samples and data are measured, `comparison` compares several
runs, and `provenance` records what a number was computed with. evaluate.py uses all of them.
"""
