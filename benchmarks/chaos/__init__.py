"""Guarded work under faults: workers, brokers and a lock store that die, and a judge who was told nothing."""
