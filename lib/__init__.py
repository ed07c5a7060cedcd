"""The library behind the book: data, models, training, attention, metrics, and what runs and renders chapters."""
