"""Measurements of the whole service against what the same model costs without it."""
