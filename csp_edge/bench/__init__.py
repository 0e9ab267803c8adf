"""How fast a model is and what memory it takes, over the full cache and over pruned ones."""
