"""A vision and audio encoder as a service of its own: media in over HTTP, embeddings out."""

__version__ = "0.1.0"
