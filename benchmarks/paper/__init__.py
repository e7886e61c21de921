"""EfficientVLA's tables, counted on our graphs."""
