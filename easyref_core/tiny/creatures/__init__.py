"""A world of creatures with continuous identities."""
