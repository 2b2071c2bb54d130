"""Samples of a trained network, and numbers that say how good they are.

`sampling` draws, `likelihoods` counts bits per dimension, `features` are named spaces in which
`distances` between samples and data are measured, `comparison` puts several runs side by side, and
`provenance` records what a number was computed with. evaluate.py prints all of it.
"""
