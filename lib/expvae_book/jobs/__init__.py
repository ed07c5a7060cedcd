"""What the chapters run: a module for each data set, which trains, measures and stores all that a page will ask for."""
