"""An emulated CUDA device, for counting (`benchmarks.roofline`) and for tests (`tests/cuda`): no GPU is needed."""
