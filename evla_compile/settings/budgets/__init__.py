"""The lossy techniques, one file each: what is set, what calibration measures for it, and what is decided."""
