"""Which workers there are: from flags and files, registered over gRPC, and what each says of itself."""
