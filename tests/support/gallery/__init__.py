"""The gallery: adapters as programs write them, each with the change that it makes by definition."""
