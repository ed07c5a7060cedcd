"""Measures of how well a map or a score finds anomalies: NumPy arrays or tensors in, plain numbers out."""
