"""The networks of the book: plain modules with encode(x) -> (mu, logvar) and decode(z) -> logits."""
