"""Predictions held against measurements, theory and peers: one function for each ``moeplan validate``.

Stands on the pipeline, which it asks as a user would; nothing below knows it.
"""
