"""Inputs that nobody made on purpose: valid files that are mutated, files that are put together at random, a guard."""
