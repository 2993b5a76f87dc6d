"""What several tests share: where to run, what to feed, what to expect, how close is close enough."""
