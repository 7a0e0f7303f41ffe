"""Guarded work under faults: workers, connections and a lock store that die, and a judge who was told nothing."""
