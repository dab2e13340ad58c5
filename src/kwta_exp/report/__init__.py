"""Text for people, made from results: the table after a run, comparisons, curves."""
