"""Two towers, a nested embedding, and the folder that an encoder is kept in."""
