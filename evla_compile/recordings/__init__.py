"""Observations out of recordings: LeRobotDataset folders and MCAP bags; no torch."""
