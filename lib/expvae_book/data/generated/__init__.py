"""What draws the images that stand in for data sets: the same bytes on every machine, and the exact masks of them."""
