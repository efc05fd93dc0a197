"""Ways an embedding leaves: the response body, a ZMQ push."""
