"""Model folders: reading, coding, exporting and writing them."""
