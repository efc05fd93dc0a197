"""What crosses a process or the network: messages, frames, items and embeddings. Imports nothing of the other rooms."""
