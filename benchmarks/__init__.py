"""Measurements of models, exports and engines."""
