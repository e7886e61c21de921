"""TensorRT and TensorRT-RTX as one library, and the CUDA calls around them; no torch."""
