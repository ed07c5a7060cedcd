"""What makes the images that stand in for data sets: the same bytes on every machine, and their exact masks."""
