"""Views of results: the terminal, HTML pages, figures, and other tools' objects. No view imports a result class."""
