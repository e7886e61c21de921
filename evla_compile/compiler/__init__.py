"""From a configuration and a plan to a rewritten, static graph and its report."""
