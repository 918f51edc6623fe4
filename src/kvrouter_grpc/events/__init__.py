"""The event plane: KV events of the engines, made contiguous, decoded and handed to the index."""
