"""Did it work? Models side by side on held-out records, with and without the image: figures, intervals, a report."""
