"""Launch, watch and measure a cluster; the command line. The composition root: may import everything."""
