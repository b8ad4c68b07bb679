"""How the demo treats each testbed."""
