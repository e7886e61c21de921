"""Mutation score: how many small faults, put into the code one at a time, the tests notice."""
