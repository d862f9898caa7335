"""Event buses behind one port, so that each is measured by the same hand."""
