"""What the library keeps in the database: no lock, only what some options need."""
