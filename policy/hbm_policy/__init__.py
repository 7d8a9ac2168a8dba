"""Pure decisions: a `Reading` of the pod goes in, a `Decision` about α comes out."""
