"""Ways an embedding leaves other than in the answer: a ZMQ push, a file in a store."""
