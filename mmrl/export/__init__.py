"""`mmrl export`: a trained model -> encoders of one dim each, in the folder formats of other tools."""
