"""What the page of one chapter alone draws and tabulates of its runs; no torch here."""
