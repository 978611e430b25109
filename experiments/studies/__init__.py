"""What studies share: training many runs, tables, the look of figures."""
