"""Pre- and post-processing on the host: frames and instructions to a graph's inputs, samples to actions; no torch."""
