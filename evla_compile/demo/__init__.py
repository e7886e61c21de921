"""The demo of the package's small trained policy: compile, export, verify and run it."""
