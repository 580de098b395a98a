"""How results look: in the terminal, as pages, figures, and other tools' objects. Knows no result class."""
