"""The small trained policy of the package, through the whole path."""
