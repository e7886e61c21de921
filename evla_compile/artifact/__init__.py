"""The files of a compiled policy, written by the compiler and read on the robot; no torch."""
