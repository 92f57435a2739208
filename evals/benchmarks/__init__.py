"""Speed, measured with router, table and gather inside the timing."""
