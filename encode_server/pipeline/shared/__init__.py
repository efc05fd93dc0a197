"""A second level of the cache, which replicas share: its values, its connections, and what a bad one may cost."""
