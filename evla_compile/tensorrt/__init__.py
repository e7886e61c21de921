"""One interface to TensorRT and TensorRT-RTX, and the CUDA calls that engines need; no torch."""
