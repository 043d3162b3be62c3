"""How files and progress bars are written."""
