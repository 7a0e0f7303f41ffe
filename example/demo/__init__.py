"""`python -m example.demo`: real servers, real clients, a table and a verdict."""
