"""Measurements, each on servers of its own: `make bench`."""
