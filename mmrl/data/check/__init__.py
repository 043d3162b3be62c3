"""`mmrl check`: every problem of a data set, before a run."""
