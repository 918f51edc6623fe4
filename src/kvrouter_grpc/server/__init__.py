"""The gRPC surface: reads requests, calls the rooms behind it, writes replies. It decides nothing."""
