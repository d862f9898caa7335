"""Groups whose members are all on this node: a pure core, a shell around it, a store below it."""
