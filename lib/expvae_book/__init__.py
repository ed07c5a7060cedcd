"""The machinery of the book: data, training, the store of runs, published numbers and verdicts, figures, pages."""

if __name__ != "expvae_book":
    raise ImportError(f"import this package as expvae_book, not as {__name__}: a second copy would have its own state")
