"""The decomposed state, and how a layer moves it."""
