"""What the router costs, beside its peers and the physical limit. See README.md."""
