"""What is searched and how it is timed: problems, plans, performance measurements."""
