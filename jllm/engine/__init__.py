"""Where host policy meets device work; knows no text and no HTTP."""
