"""The stock app: products that are sold, one at a time, through several doors."""
