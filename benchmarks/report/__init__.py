"""What the committed results say: the README's tables, plots, one HTML page, and how two runs compare."""
