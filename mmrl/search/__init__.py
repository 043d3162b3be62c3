"""From the pictures of a set to an index over their vectors, and to the nearest ones of a query."""
