"""How far one model's outputs are from another's, and how sure that is: distances, predictions, intervals."""
