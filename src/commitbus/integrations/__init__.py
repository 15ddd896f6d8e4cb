"""Integrations: each is a module of its own, with an extra of its name. Importing commitbus imports none of them."""
