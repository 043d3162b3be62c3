"""Tables, plots and HTML pages of an evaluation."""
