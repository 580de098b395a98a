"""Other tools' interfaces to this package, each a module of its own that is imported by name."""
