"""Meta-World as CogACT sees it."""
