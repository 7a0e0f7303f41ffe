"""A small Django shop: one critical section, and every door that leads to it."""
