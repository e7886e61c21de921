"""Lowerings of a finished graph to files that other runtimes read."""

from evla_compile.exporters.to_onnx import to_onnx

__all__ = ["to_onnx"]
