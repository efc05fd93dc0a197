"""One server: its wiring and life, and one request's life."""
