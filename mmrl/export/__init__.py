"""From a trained model to an encoder of one dim that a stack can load."""
