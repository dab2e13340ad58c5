"""Images: where they come from (:mod:`.datasets`, no torch) and how they are fed (:mod:`.batches`)."""
