"""Datasets (:mod:`.datasets`, imported without torch) and batches of their images (:mod:`.batches`)."""
