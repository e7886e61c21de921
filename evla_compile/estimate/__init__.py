"""Sizes, operations and rooflines of a policy before anything is downloaded."""
