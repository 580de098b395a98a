"""Forward passes with decompositions, and reading scores and states from them."""
