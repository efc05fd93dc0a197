"""One path for every multimodal family that transformers can load, and the checks that make unknown families safe."""
