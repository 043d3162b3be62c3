"""`mmrl check`: finds the problems of a data set before a run."""
