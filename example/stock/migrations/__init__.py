"""The tables of the stock app, step by step."""
