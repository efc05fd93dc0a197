"""A connector that vLLM loads: it receives pushed embeddings, see `connector.py`. Imported inside vLLM's processes."""
